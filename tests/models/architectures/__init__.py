"""Every image-text architecture, built tiny, through one tester."""
