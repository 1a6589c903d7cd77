"""Routed linear: each row uses the weights of the edit it is routed to."""
