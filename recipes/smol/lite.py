"""EfficientNet-Lite0 for training on a CPU: the function of transformers' `EfficientNetModel` with frozen
batch-norm statistics, each batch norm folded into its convolution on the fly, the gates (which are 1) left
out. The grid is that of Lite's last convolution, in front of the visual vocabulary.

Faster than the stock module; its parameters are those of the model given.
"""

import torch
import torch.nn.functional as F
from torch import nn


class FoldedConv(nn.Module):
    """A convolution without bias and the frozen batch norm behind it, as one convolution."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, pad=None, act=True):
        super().__init__()
        self.conv, self.norm, self.pad, self.act = conv, norm, pad, act

    def forward(self, x):
        scale = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
        bias = self.norm.bias - self.norm.running_mean * scale
        weight = self.conv.weight * scale[:, None, None, None]
        if self.pad is not None:
            x = F.pad(x, self.pad)
        x = F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding, groups=self.conv.groups)
        return F.relu6(x, inplace=True) if self.act else x


class Lite(nn.Module):
    """Pictures in -1 to 1 [B, 3, S, S] to a grid [B, 1280, S/32, S/32], with the parameters of `model`."""

    def __init__(self, model):
        super().__init__()
        self.blocks = nn.ModuleList()
        e = model.embeddings
        self.stem = FoldedConv(e.convolution, e.batchnorm, e.padding.padding)
        *blocks, vocabulary, _ = model.encoder.blocks
        for block in blocks:
            layers = nn.ModuleList()
            if block.expand:
                layers.append(FoldedConv(block.expansion.expand_conv, block.expansion.expand_bn))
            d = block.depthwise_conv
            pad = d.depthwise_conv_pad.padding if d.stride == 2 else None
            layers.append(FoldedConv(d.depthwise_conv, d.depthwise_norm, pad))
            p = block.projection
            layers.append(FoldedConv(p.project_conv, p.project_bn, act=False))
            layers.residual = p.apply_dropout
            self.blocks.append(layers)
        self.top = FoldedConv(vocabulary.expansion.expand_conv, vocabulary.expansion.expand_bn)

    def lower(self, x, upto: int):
        x = self.stem(x)
        return self._run(x, self.blocks[:upto])

    def _run(self, x, blocks):
        for layers in blocks:
            y = x
            for layer in layers:
                y = layer(y)
            x = x + y if layers.residual else y
        return x

    def forward(self, x, frozen: int = 0):
        """`frozen`: that many blocks at the bottom run without gradients."""
        x = x.contiguous(memory_format=torch.channels_last)
        if frozen:
            with torch.no_grad():
                x = self.lower(x, frozen)
            return self.top(self._run(x, self.blocks[frozen:]))
        return self.top(self.lower(x, len(self.blocks)))
