"""Fast sampling on a GPU: evaluations of the network in fused kernels, replayed as CUDA graphs, and float8 products on
request. There is no torch.compile: Triton compiles the kernels in a second or two."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn
from torch.nn.attention import sdpa_kernel

from ..models.fused_lightning_dit import ATTENTION, padded_swiglu, why_not_fused
from ..models.rotary_lightning_dit import lightning_dit_rotary_tables
from ..models.transformer_lightning_dit import LightningDiTTransformer2DModel
from .sampler_config import SamplerConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def speed_up(pipe: DiffusionPipeline, fp8: bool = False) -> str:
    """Have a pipeline on a GPU sample faster: the same images but for rounding.

        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")
        speed_up(pipe)

    Call it when the weights are final and on their device: fuse adapters before. Later changes to the layers (hooks,
    step caches, `pipe.to`) have no effect. `slow_down(pipe)` undoes it.

    Args:
        pipe: a `LightningDiTPipeline`, in bfloat16 or float16.
        fp8: the large products of the blocks in float8 (e4m3, one scale per row); the pipeline has to be in bfloat16,
            on a GPU with float8 units (Ada, Hopper or later).

    Returns: what is on, in words.

    Raises: ValueError if device, precision or pipeline do not allow it, saying why.
    """
    if reason := why_not(pipe, fp8):
        raise ValueError(f"sampling cannot be sped up: {reason}")
    from ..models import lightning_dit_kernels

    for network in _networks(pipe):
        network.forward = GraphedForward(network, FusedForward(network, lightning_dit_kernels, fp8))
    words = [str(pipe.transformer.dtype).removeprefix("torch."), "fused kernels", "CUDA graphs"]
    return ", ".join(words + ["float8 products"] * fp8)


def prepare_sampling(pipe: DiffusionPipeline, config: SamplerConfig) -> str:
    """`speed_up` as a configuration says; if its `fast` is None, only where that is possible.

    Returns: a line that says what is on. Raises: as `speed_up`, if `fast` or `fp8` is asked for.
    """
    place = f"sampling on {pipe.device}"
    plain = str(pipe.transformer.dtype).removeprefix("torch.")
    if config.fast is False or (config.fast is None and not config.fp8 and pipe.device.type == "cpu"):
        return f"{place}: {plain}"
    if config.fast is None and not config.fp8 and (reason := why_not(pipe)):
        return f"{place}: {plain}, not sped up ({reason})"
    return f"{place}: {speed_up(pipe, config.fp8)}"


def slow_down(pipe: DiffusionPipeline) -> None:
    """Undo `speed_up`."""
    for network in _networks(pipe):
        network.__dict__.pop("forward", None)


def why_not(pipe: DiffusionPipeline, fp8: bool = False) -> str | None:
    """Why `speed_up` is not possible; None if it is."""
    for network in _networks(pipe):
        device, dtype = network.device, network.dtype
        if reason := why_not_fused(network, device):
            return reason
        if dtype not in (torch.bfloat16, torch.float16):
            return f"its precision is {dtype}, expected torch.bfloat16 or torch.float16"
        if getattr(network, "_hf_peft_config_loaded", False):
            return "the transformer has adapters: fuse and unload them first"
        if fp8 and dtype != torch.bfloat16:
            return f"float8 products give bfloat16, and the precision is {dtype}"
        if fp8 and (width := network.norm_out.weight.shape[0]) % 16:
            return f"its tokens have {width} channels, and float8 products take multiples of 16: leave fp8 off"
        if fp8 and torch.cuda.get_device_capability(device) < (8, 9):
            return f"{torch.cuda.get_device_name(device)} has no float8 units, expected Ada, Hopper or later"
    return None


def _networks(pipe: DiffusionPipeline) -> list[nn.Module]:
    return [network for network in (pipe.transformer, getattr(pipe, "guidance_transformer", None)) if network]


class FusedForward:
    """A LightningDiT's forward pass without gradients, in which one kernel does all work between two matrix products.

    Args:
        network: on its device. Its weights are used in place, except for copies: queries, keys and values in one
            matrix, a SwiGLU that `padded_swiglu` pads, and float8 weights.
        kernels: models/lightning_dit_kernels.py, or another module with its functions.
    """

    def __init__(self, network: LightningDiTTransformer2DModel, kernels: ModuleType, fp8: bool = False):
        self.network, self.kernels, self.fp8 = network, kernels, fp8
        config = network.config
        grid = config.sample_size // config.patch_size
        self.rotary = lightning_dit_rotary_tables(grid, config.attention_head_dim, network.device)
        self.products = [self._products_of(block) for block in network.blocks]

    @torch.no_grad()
    def _products_of(self, block: nn.Module) -> dict[str, Product]:
        attention = block.attn
        parts = [attention.to_qkv] if attention.fused_projections else [attention.to_q, attention.to_k, attention.to_v]
        weight, bias = (torch.cat([getattr(layer, name) for layer in parts]) for name in ("weight", "bias"))
        first, first_bias, last = padded_swiglu(block.mlp, weight.dtype)
        products = {"qkv": (weight, bias), "w12": (first, first_bias)}
        # without bias: the kernel that adds these two to the residual stream adds it
        products |= {"out": (attention.to_out[0].weight, None), "w3": (last, None)}
        return {name: Product(*parameters, self.kernels, self.fp8) for name, parameters in products.items()}

    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_base: bool = False,
        next_timestep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """As the network's `forward` without `return_dict`: (B, C, H, W), with `return_base` two of them."""
        network, base = self.network, ()
        tokens, conditioning = network.embed(hidden_states, timestep, class_labels, next_timestep)
        tokens = tokens.contiguous()  # changed in place from here on
        modulations = [block.modulation(conditioning) for block in network.blocks]  # six of (B, 1, D) each
        # the norm at the beginning of each block and, after the last block, the final one
        norms = [(block.norm1, *six[:2], self.fp8) for block, six in zip(network.blocks, modulations, strict=True)]
        norms.append((network.norm_out, *network.modulation_out(conditioning), False))
        normed = self._norm(tokens, None, None, None, *norms[0])  # and, in float8, the factors
        for index, (block, products) in enumerate(zip(network.blocks, self.products, strict=True)):
            _, _, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulations[index]
            update, bias = self._attention(block.attn, products, normed), block.attn.to_out[0].bias
            normed = self._norm(tokens, update, bias, gate_attn, block.norm2, shift_mlp, scale_mlp, self.fp8)
            update = products["w3"](*self.kernels.swiglu(products["w12"](*normed), self.fp8))
            normed = self._norm(tokens, update, block.mlp.w3.bias, gate_mlp, *norms[index + 1])
            if return_base and index + 1 == network.config.base_head_layer:
                shift, scale = network.base_modulation_out(conditioning)
                ends = self._norm(tokens, None, None, None, network.base_norm_out, shift, scale, False)
                base = (network.to_velocity(network.base_proj_out(ends[0]), hidden_states, timestep),)
        return network.to_velocity(network.proj_out(normed[0]), hidden_states, timestep), *base

    def _norm(self, tokens, update, bias, gate, norm, shift, scale, fp8):
        dtype = torch.float8_e4m3fn if fp8 else tokens.dtype
        arguments = tokens, update, bias, gate, norm.weight, shift, scale, norm.eps, dtype
        return self.kernels.residual_norm(*arguments, inplace=True)[1:]

    def _attention(self, attention: nn.Module, products: dict[str, Product], normed: tuple) -> torch.Tensor:
        joined = products["qkv"](*normed)  # (B, N, 3 · heads · d)
        norms, eps = None, 0.0
        if isinstance(attention.norm_q, nn.RMSNorm):
            norms, eps = (attention.norm_q.weight, attention.norm_k.weight), attention.norm_q.eps
        self.kernels.rotate_(joined, *self.rotary, norms, eps)
        query, key, value = joined.unflatten(-1, (3, -1, attention.head_dim)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(ATTENTION, set_priority=True):
            attended = F.scaled_dot_product_attention(query, key, value)  # (B, heads, N, d)
        attended = attended.transpose(1, 2).flatten(2)
        return products["out"](*(self.kernels.to_float8(attended) if self.fp8 else (attended, None)))


class Product:
    """x (..., K) -> x · weight + bias (..., N), in float8 if asked for (arXiv:2209.05433): each row of the weight and
    of x is scaled so that its largest value is float8's largest. K and N must then be multiples of 16."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kernels: ModuleType, fp8: bool):
        self.weight, self.bias, self.factors = weight, bias, None
        if fp8:
            self.weight, factors = kernels.to_float8(weight)
            self.factors = factors.T.contiguous()  # (1, N)

    def __call__(self, x: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        if self.factors is None:
            return F.linear(x, self.weight, self.bias)
        product = torch._scaled_mm(
            x.flatten(0, -2),
            self.weight.t(),
            scale_a=factors,
            scale_b=self.factors,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return product.unflatten(0, x.shape[:-1])


class GraphedForward:
    """A forward pass that is recorded as a CUDA graph once per batch size, then replayed: one launch for all of its
    kernels. Inputs are copied to where the recording reads them."""

    def __init__(self, network: nn.Module, forward: FusedForward):
        self.network, self.forward = network, forward
        self.recordings: dict[Any, tuple[torch.cuda.CUDAGraph, list[torch.Tensor], tuple[torch.Tensor, ...]]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_dict: bool = True,
        return_base: bool = False,
        next_timestep: torch.Tensor | None = None,
    ) -> Any:
        """As `LightningDiTTransformer2DModel.forward`, which is called instead if gradients are on."""
        if torch.is_grad_enabled():
            plain = type(self.network).forward
            arguments = hidden_states, timestep, class_labels, return_dict, return_base, next_timestep
            return plain(self.network, *arguments)
        times = [timestep] if next_timestep is None else [timestep, next_timestep]
        times = [torch.as_tensor(t, device=hidden_states.device).expand(len(hidden_states)) for t in times]
        inputs = [hidden_states, times[0], class_labels, *times[1:]]
        key = return_base, *((value.shape, value.dtype) for value in inputs)
        if key not in self.recordings:
            self.recordings[key] = self._record(inputs, return_base)
        graph, places, results = self.recordings[key]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        outputs = tuple(result.clone() for result in results)  # the next replay writes over them
        if return_base or not return_dict:
            return outputs
        return Transformer2DModelOutput(sample=outputs[0])

    def _record(self, inputs: list[torch.Tensor], return_base: bool) -> tuple[Any, ...]:
        places = [value.clone() for value in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # Triton compiles, cuBLAS and cuDNN choose algorithms
                self.forward(*places[:3], return_base, *places[3:])
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            results = self.forward(*places[:3], return_base, *places[3:])
        return graph, places, results
