"""The Diffusion Transformer: patchify, N adaLN-Zero blocks, unpatchify (DiT paper, arXiv 2212.09748, figure 3).

`Transformer2DModel` mirrors `DiTTransformer2DModel` of diffusers 0.42: config, state-dict keys and numbers. It differs in
showing the two towers of a DiT. `condition(timestep, class_labels)` is the conditioning tower; `forward` is the token
tower, and takes either those two arguments or the result of `condition`.
"""

import json
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.model_loading_utils import load_state_dict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from nets.attention import BasicTransformerBlock
from nets.embeddings import PatchEmbed
from nets.sharing import is_copy, share_embedders, share_if_equal, write_out_every_copy

# Keys that only the published 2022 configs carry, with the one value that means "a DiT".
LEGACY_CONFIG = {"cross_attention_dim": None, "num_vector_embeds": None, "use_linear_projection": False,
                 "only_cross_attention": False}
CLASS_NAMES_ON_DISK = ("DiTTransformer2DModel", "Transformer2DModel")  # today's and the published one


class Conditioning(NamedTuple):
    """All that the token tower needs to know of (timestep, class): the result of `Transformer2DModel.condition`."""

    blocks: torch.Tensor  # (batch, layers, 6, dim): each block's shift, scale, gate for attention, then for the MLP
    head: torch.Tensor  # (batch, 2, dim): the output head's shift and scale

    def rows(self, index: torch.Tensor) -> "Conditioning":
        """The conditioning of the pictures `index`, (n,) int64, in that order."""
        return Conditioning(self.blocks[index], self.head[index])


class Transformer2DModel(ModelMixin, ConfigMixin, CacheMixin):
    """Predicts the noise in latents, and with `out_channels = 2 * in_channels` its variance, for a class and a time.

    The defaults are DiT-XL/2's for 256x256 pictures, apart from `out_channels`, where the published model has 8. The null
    class, "no class", has the id `num_embeds_ada_norm`. `norm_num_groups` and `upcast_attention` are upstream's config keys
    without an effect, there as here. `downscale_freq_shift=0` with `norm_eps=1e-6` gives facebookresearch/DiT's numbers
    instead of diffusers'. A new model is initialised as the paper does it (adaLN-Zero).

    Every block has an embedder in its state dict. A new model holds one, the same for all blocks; so does a loaded one
    whose copies are equal. Unequal copies stay apart.

    Raises ValueError for a config value that this network does not implement.
    Source: DiT section 3.2; diffusers `DiTTransformer2DModel`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock"]
    _repeated_blocks = ["BasicTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        downscale_freq_shift: float = 1,
    ):
        super().__init__()
        require("norm_type", norm_type, "ada_norm_zero")
        require("activation_fn", activation_fn, "gelu-approximate")
        if not isinstance(num_embeds_ada_norm, int) or num_embeds_ada_norm < 1:
            raise ValueError(f"num_embeds_ada_norm={num_embeds_ada_norm!r} is not supported: it is the number of classes")
        dim = num_attention_heads * attention_head_dim
        self.patch_size = patch_size
        self.out_channels = in_channels if out_channels is None else out_channels
        self.gradient_checkpointing = False

        self.pos_embed = PatchEmbed(sample_size, patch_size, in_channels, dim)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(dim, num_attention_heads, attention_head_dim, num_embeds_ada_norm, dropout,
                                  attention_bias, norm_elementwise_affine, norm_eps, downscale_freq_shift)
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.proj_out_1 = nn.Linear(dim, 2 * dim)
        self.proj_out_2 = nn.Linear(dim, patch_size * patch_size * self.out_channels)

        if self.device.type != "meta":  # on meta, the weights that come later decide whether the embedder is shared
            share_embedders(self)
            self.initialize_weights()
        self.register_state_dict_post_hook(write_out_every_copy)
        self.register_load_state_dict_pre_hook(share_if_equal)

    def initialize_weights(self):
        """The paper's initialisation: every block starts as the identity, and the output is zero (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.pos_embed.proj.bias)
        for block in self.transformer_blocks:
            nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
            nn.init.normal_(block.norm1.emb.timestep_embedder.linear_1.weight, std=0.02)
            nn.init.normal_(block.norm1.emb.timestep_embedder.linear_2.weight, std=0.02)
            nn.init.zeros_(block.norm1.linear.weight)
        for layer in (self.proj_out_1, self.proj_out_2):
            nn.init.zeros_(layer.weight)

    def condition(self, timestep: torch.Tensor, class_labels: torch.Tensor) -> Conditioning:
        """The conditioning tower: everything that depends on time and class alone.

        Args: `timestep` (batch,), in the training schedule's 0..999, fractions allowed; `class_labels` (batch,) int64 in
        0..num_embeds_ada_norm, the last one being the null class. In training mode labels are dropped here.
        """
        embeddings = {}  # one entry an embedder: one in all, unless loaded copies differed
        for block in self.transformer_blocks:
            if block.norm1.emb not in embeddings:
                embeddings[block.norm1.emb] = block.norm1.emb(timestep, class_labels)  # (batch, dim)
        blocks = torch.stack(
            [block.norm1.modulation(embeddings[block.norm1.emb]) for block in self.transformer_blocks], dim=1
        )  # (batch, layers, 6, dim)
        embedding = embeddings[self.transformer_blocks[0].norm1.emb]
        head = self.proj_out_1(F.silu(embedding)).unflatten(1, (2, -1))  # (batch, 2, dim)
        return Conditioning(blocks, head)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        *,
        conditioning: Conditioning | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """The token tower: noisy latents to predicted noise.

        Args: `hidden_states` (batch, in_channels, height, width), sizes multiples of the patch size; and either
        `timestep` and `class_labels` or `conditioning`, see `condition`.
        Returns an output whose `sample` is (batch, out_channels, height, width), or with `return_dict=False` a 1-tuple.
        Raises ValueError if the sizes do not fit, or the conditioning is missing or given twice.
        """
        if (conditioning is None) == (timestep is None or class_labels is None):
            raise ValueError("forward needs timestep and class_labels, or else conditioning=model.condition(...)")
        height, width = hidden_states.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"latents of {height}x{width} do not divide into patches of {self.patch_size}")
        if conditioning is None:
            conditioning = self.condition(timestep, class_labels)

        hidden_states = self.pos_embed(hidden_states)  # (batch, tokens, dim)
        for block, modulation in zip(self.transformer_blocks, conditioning.blocks.unbind(1)):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, modulation)
            else:
                hidden_states = block(hidden_states, modulation)  # (batch, tokens, dim)

        shift, scale = conditioning.head.unsqueeze(2).unbind(1)  # (batch, 1, dim) each
        hidden_states = self.norm_out(hidden_states) * (1 + scale) + shift  # (batch, tokens, dim)
        hidden_states = self.proj_out_2(hidden_states)  # (batch, tokens, patch * patch * out_channels)
        sample = self.unpatchify(hidden_states, height, width)  # (batch, out_channels, height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def unpatchify(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(batch, tokens, patch * patch * channels) -> (batch, channels, height, width)."""
        patch, rows, columns = self.patch_size, height // self.patch_size, width // self.patch_size
        patches = tokens.reshape(-1, rows, columns, patch, patch, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, height, width)

    def enable_cache(self, config):
        """As diffusers' `enable_cache`: skip work in steps that resemble the last one, at a price in the picture.

        Works here with `FirstBlockCacheConfig` and `TaylorSeerCacheConfig`; the latter, where it names no modules itself,
        caches each block's attention and MLP, and in its lite mode whole blocks and the output.
        Raises ValueError for another config, and for one that no module of this network matches: it would do nothing.
        """
        if not isinstance(config, FirstBlockCacheConfig | TaylorSeerCacheConfig):
            raise ValueError(f"{type(config).__name__} does not work with this network; use FirstBlockCacheConfig or "
                             "TaylorSeerCacheConfig")
        TransformerBlockRegistry.register(BasicTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))
        if isinstance(config, TaylorSeerCacheConfig) and config.use_lite_mode:
            config = replace(config, use_lite_mode=False, skip_predict_identifiers=[r"transformer_blocks\.\d+"],
                             cache_identifiers=["proj_out_2"])
        elif isinstance(config, TaylorSeerCacheConfig) and not config.cache_identifiers:
            config = replace(config, cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"])
        hooks_before = self.count_hooks()
        super().enable_cache(config)
        if self.count_hooks() == hooks_before:
            self.disable_cache()
            raise ValueError(f"{config} matches no module of this network, so that nothing would be cached")

    def count_hooks(self) -> int:
        """How many of diffusers' hooks the modules of this network have."""
        return sum(len(module._diffusers_hook.hooks) for module in self.modules() if hasattr(module, "_diffusers_hook"))

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """As diffusers' `from_config`, for today's configs and the published legacy ones.

        Raises ValueError, naming the key, for a config of another network.
        """
        if isinstance(config, dict):
            require("_class_name", config.get("_class_name", CLASS_NAMES_ON_DISK[0]), *CLASS_NAMES_ON_DISK)
            for key, supported in LEGACY_CONFIG.items():
                require(key, config.get(key, supported), supported)
            config = {key: value for key, value in config.items() if key not in LEGACY_CONFIG}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def to_json_string(self) -> str:
        """The config as upstream writes it: under its class name, and without the key that it lacks unless that is set."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = CLASS_NAMES_ON_DISK[0]
        if config["downscale_freq_shift"] == 1:
            del config["downscale_freq_shift"]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, resolved_model_file, *args, **kwargs):
        """The step of `from_pretrained` that fills the model: whether the embedder is shared is settled before it.

        Raises ValueError for weights that are not this network's: none is left at random, none is left out.
        """
        files = [load_state_dict(file) for file in resolved_model_file]  # memory-mapped, and let go again
        given = {key: tensor for weights in files for key, tensor in weights.items()}
        require_same_weights(model.state_dict(), given, any_shape=kwargs.get("ignore_mismatched_sizes", False))
        equal = share_if_equal(model, given)
        del files, given
        if equal and state_dict is not None:
            state_dict = {key: tensor for key, tensor in state_dict.items() if not is_copy(key)}
        loaded = super()._load_pretrained_model(model, state_dict, resolved_model_file, *args, **kwargs)
        if equal:
            share_embedders(model)  # a shard, which is not all of the weights, may have un-shared it on its way
        return loaded


def require_same_weights(wanted: dict[str, torch.Tensor], given: dict[str, torch.Tensor], any_shape: bool = False):
    """Raise a ValueError, in one line, unless two state dicts have the same keys and shapes."""
    differences = {
        "missing": [key for key in wanted if key not in given],
        "unknown": [key for key in given if key not in wanted],
        "of another shape": [f"{key} {tuple(given[key].shape)} instead of {tuple(wanted[key].shape)}" for key in wanted
                                 if not any_shape and key in given and given[key].shape != wanted[key].shape],
    }
    found = "; ".join(f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
                      for what, keys in differences.items() if keys)
    if found:
        raise ValueError(f"these are not the weights of this network: {found}")


def require(key: str, value, *supported):
    """Raise a ValueError that names the config key, unless the value is one of those supported."""
    if value not in supported:
        raise ValueError(f"config {key}={value!r} is not supported by this network; it does " +
                         " or ".join(repr(choice) for choice in supported))
