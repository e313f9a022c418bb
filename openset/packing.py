"""Backbones as a CPU computes them fastest without a compiler: oneDNN's own layout of the weights, and one pass a layer.

In eager mode every call lays the weights of a convolution out anew (in bfloat16 it also rounds them anew), and batch norm, ReLU
and the sum of a residual block read and write the whole activation once more. A packed backbone has its weights rounded and laid
out once, batch norm folded into them, and ReLU and sum computed while the convolution writes.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Images of a batch that the layout for several images is made for; it serves all such batches about as well.
_SEVERAL = 4
_SUMS = (operator.add, operator.iadd, torch.add)

Kind = TypeVar("Kind", bound=nn.Module)


def can_pack(precision: str) -> bool:
    """Whether this torch on this processor packs a backbone; oneDNN has no bfloat16 where the hardware has none."""
    if not torch._C._has_mkldnn:
        return False
    return precision == "float32" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed_backbone(network: nn.Module, images: Tensor, precision: str) -> nn.Module:
    """A copy of a backbone that has its weights packed; it is for inference alone.

    The weights are laid out for the threads that torch has now.

    Args:
        network: in evaluation form, traceable by ``torch.fx``.
        images: any that it takes, (N, channels, H, W) float32; their size is what the weights are laid out for.
        precision: "float32" or "bfloat16"; images and features are float32 either way.
    """
    traced = fx.symbolic_trace(copy.deepcopy(network).eval())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    once = {target for target, count in calls.items() if count == 1}
    _fold_batch_norm(traced, once)
    ShapeProp(traced).propagate(images[:1])
    dtype = getattr(torch, precision)
    for node in list(traced.graph.nodes):
        convolution = _module(traced, node, nn.Conv2d)
        if convolution is not None and node.target in once and _is_plain(convolution):
            _pack(traced, node, convolution, dtype)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return _Rounded(traced.to(dtype), dtype) if dtype != torch.float32 else traced


class PackedConv2d(nn.Module):
    """A convolution with its bias, then possibly a sum and ReLU, in one pass.

    oneDNN wants another layout where several threads share one image, hence two of them. On one core they are the same.

    Args:
        convolution: whose weights are packed.
        shape: of its input, (N, channels, H, W).
        dtype: of weights and activations.
        relu: apply it at last.

    Attributes:
        threads: that one image alone is laid out for.
    """

    def __init__(
        self, convolution: nn.Conv2d, shape: torch.Size, dtype: torch.dtype, *, relu: bool
    ) -> None:
        super().__init__()
        self._geometry = (
            list(convolution.padding), list(convolution.stride), list(convolution.dilation), convolution.groups
        )  # fmt: skip
        self._relu = "relu" if relu else "none"
        self.threads = torch.get_num_threads()
        weight = convolution.weight.detach().to(dtype)
        self._bias = None if convolution.bias is None else convolution.bias.detach().to(dtype)
        self._several = self._alone = self._laid_out(weight, [_SEVERAL, *shape[1:]])
        if self.threads > 1:
            self._alone = self._laid_out(weight, [1, *shape[1:]])

    def _laid_out(self, weight: Tensor, shape: list[int]) -> Tensor:
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        laid_out: Tensor = reorder(weight.to_mkldnn(), *self._geometry, shape)
        return laid_out

    def forward(self, inputs: Tensor, added: Tensor | None = None) -> Tensor:
        """(N, channels, H, W) -> (N, channels, H, W); ``added`` is overwritten by the result."""
        is_alone = len(inputs) == 1 and torch.get_num_threads() == self.threads
        weights = self._alone if is_alone else self._several
        computed: Tensor
        if added is None:
            computed = torch.ops.mkldnn._convolution_pointwise(
                inputs, weights, self._bias, *self._geometry, self._relu, [], ""
            )
        else:
            relu = None if self._relu == "none" else self._relu
            computed = torch.ops.mkldnn._convolution_pointwise_.binary(
                added, inputs, weights, self._bias, *self._geometry, "add", 1.0, relu, [], ""
            )
        return computed


class _Rounded(nn.Module):
    """Rounds what comes in, and gives out float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self._dtype = network, dtype

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images.to(self._dtype))
        return features.float()


def _module(traced: fx.GraphModule, node: Any, kind: type[Kind]) -> Kind | None:
    """The module that a node of the graph calls, if it is of that kind."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = traced.get_submodule(str(node.target))
    return module if isinstance(module, kind) else None


def _fold_batch_norm(traced: fx.GraphModule, once: set[Any]) -> None:
    for node in list(traced.graph.nodes):
        norm = _module(traced, node, nn.BatchNorm2d)
        if norm is None or node.target not in once:
            continue
        source = node.all_input_nodes[0]
        convolution = _module(traced, source, nn.Conv2d)
        if convolution is None or source.target not in once or len(source.users) > 1:
            continue
        traced.set_submodule(str(source.target), fuse_conv_bn_eval(convolution, norm))
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)


def _pack(
    traced: fx.GraphModule, node: fx.Node, convolution: nn.Conv2d, dtype: torch.dtype
) -> None:
    """Replace a convolution, with the sum and ReLU that follow it where nothing else sees what lies between."""
    last, added, images = node, None, node.all_input_nodes[0]
    # It will compute later, where the sum or ReLU was: its input must not change before.
    may_move = all(_reads_alone(traced, user, images) for user in images.users)
    following = _only_user(last) if may_move else None
    if following is not None and following.target in _SUMS and not following.kwargs:
        other = next((item for item in following.args if item is not node), None)
        if _may_be_overwritten(traced, other, by=following) and _shape(other) == _shape(node):
            last, added = following, other
    following = _only_user(last) if may_move else None
    relu = _module(traced, following, nn.ReLU) is not None
    if following is not None and relu:
        last = following
    traced.set_submodule(
        str(node.target),
        PackedConv2d(convolution, _shape(images), dtype, relu=relu),
    )
    with traced.graph.inserting_before(last):
        inputs = (images,) if added is None else (images, added)
        packed = traced.graph.call_module(str(node.target), inputs)
    packed.meta = last.meta
    last.replace_all_uses_with(packed)


def _is_plain(convolution: nn.Conv2d) -> bool:
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _may_be_overwritten(traced: fx.GraphModule, node: Any, *, by: fx.Node) -> bool:
    # What a convolution wrote is nobody else's memory, if only those read it who keep no view of it.
    if not isinstance(_module(traced, node, nn.Module), nn.Conv2d | PackedConv2d):
        return False
    order = list(node.graph.nodes)
    return all(
        user is by or (_reads_alone(traced, user, node) and order.index(user) < order.index(by))
        for user in node.users
    )


def _reads_alone(traced: fx.GraphModule, user: fx.Node, node: fx.Node) -> bool:
    """Whether a node neither changes what it is given nor returns a view of it."""
    if user.target in _SUMS:
        return user.target is not operator.iadd or user.args[0] is not node
    readers = (nn.Conv2d, PackedConv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.Linear)
    return isinstance(_module(traced, user, nn.Module), readers)


def _shape(node: Any) -> torch.Size:
    shape: torch.Size = node.meta["tensor_meta"].shape
    return shape
