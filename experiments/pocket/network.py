"""The training forward: many questions per image behind a block mask, with the auxiliary losses.

It reads the parameters of the Hugging Face model and computes what that model computes (``tests/models/test_pocket.py``
compares logits); written as two small functions so that ``torch.compile`` compiles one vision layer and one decoder
layer, once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from shards import GRID, LATE_CLASSES, MIDDLE_CLASSES, NUM_PRESENCE, PATCH_CLASSES
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

NUM_PATCHES = GRID * GRID


def vision_layer(x: Tensor, num_heads: int, norms: list[Tensor], attention: list[Tensor], mlp: list[Tensor]) -> Tensor:
    """One CLIP layer on [batch, 1 + patches, width]."""
    batch, length, width = x.shape
    h = F.layer_norm(x, (width,), norms[0], norms[1], 1e-5)
    q, k, v = (
        F.linear(h, attention[2 * i], attention[2 * i + 1]).view(batch, length, num_heads, -1).transpose(1, 2)
        for i in range(3)
    )
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
    x = x + F.linear(out, attention[6], attention[7])
    h = F.linear(F.layer_norm(x, (width,), norms[2], norms[3], 1e-5), mlp[0], mlp[1])
    return x + F.linear(h * torch.sigmoid(1.702 * h), mlp[2], mlp[3])


def decoder_layer(
    x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, num_heads: int, norms: list[Tensor], weights: list[Tensor]
) -> Tensor:
    """One Llama layer on [batch, length, width]; mask [batch, 1, length, length]; cos, sin [batch, 1, length, d]."""
    batch, length, width = x.shape
    h = F.rms_norm(x.float(), (width,), norms[0], 1e-6)
    q, k, v = (F.linear(h, w).view(batch, length, num_heads, -1).transpose(1, 2) for w in weights[:3])
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(batch, length, width)
    x = x + F.linear(out, weights[3])
    h = F.rms_norm(x.float(), (width,), norms[1], 1e-6)
    return x + F.linear(F.silu(F.linear(h, weights[4])) * F.linear(h, weights[5]), weights[6])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class AuxiliaryHeads(nn.Module):
    """Linear heads that are dropped after training: patches and CLS of the tower, taps in the decoder."""

    def __init__(self, vision_width: int, text_width: int, taps: tuple[int, ...]):
        super().__init__()
        self.taps = taps
        self.patch = nn.Linear(vision_width, sum(PATCH_CLASSES.values()))
        self.presence = nn.Linear(vision_width, NUM_PRESENCE)
        self.middle = nn.Linear(text_width, sum(MIDDLE_CLASSES)) if taps else None
        self.late = nn.Linear(text_width, sum(LATE_CLASSES)) if taps else None

    def vision_loss(self, states: Tensor, labels: Tensor, presence: Tensor) -> Tensor:
        """Patch labels [B, patches, 9] and presence [B, P] from the tower's last states [B, 1 + patches, width]."""
        logits = self.patch(F.layer_norm(states[:, 1:].float(), states.shape[-1:]))
        loss = logits.new_zeros(())
        for part, (column, classes) in zip(
            logits.split(list(PATCH_CLASSES.values()), -1), enumerate(PATCH_CLASSES.values()), strict=True
        ):
            weight = torch.ones(classes, device=logits.device)
            weight[0] = 0.1
            loss = loss + F.cross_entropy(part.flatten(0, 1), labels[..., column].flatten().long(), weight=weight)
        cls = self.presence(F.layer_norm(states[:, 0].float(), states.shape[-1:]))
        return loss / 5 + 4 * F.binary_cross_entropy_with_logits(cls, presence.float())

    def tap_loss(self, states: list[Tensor], middle: Tensor, late: Tensor) -> Tensor:
        """Labels [B, T, 6] and [B, T, 7] (-1: none) from the text states [B, T, width] after the tap layers."""
        if self.middle is None or self.late is None:
            raise ValueError("these heads were built without taps")
        return _tap(self.middle, states[0], middle, MIDDLE_CLASSES) + _tap(self.late, states[1], late, LATE_CLASSES)


def _tap(head: nn.Linear, states: Tensor, labels: Tensor, classes: tuple[int, ...]) -> Tensor:
    logits = head(F.layer_norm(states.float(), states.shape[-1:]))
    loss = logits.new_zeros(())
    for part, (column, _) in zip(logits.split(list(classes), -1), enumerate(classes), strict=True):
        loss = loss + F.cross_entropy(
            part.flatten(0, 1), labels[..., column].flatten().long(), ignore_index=-1, reduction="sum"
        ) / (labels[..., column] >= 0).sum().clamp(min=1)
    return loss / len(classes)


class TrainingNetwork(nn.Module):
    """Logits of packed questions, straight from the parameters of the Hugging Face model.

    Args:
        model: the model that is trained.
        prefix: token ids before the image.
        compile_layers: compile the two layer functions.
    """

    def __init__(self, model: LlavaForConditionalGeneration, prefix: list[int], compile_layers: bool):
        super().__init__()
        self.model = model
        self.register_buffer("prefix", torch.tensor(prefix), persistent=False)
        self._vision_layer = torch.compile(vision_layer) if compile_layers else vision_layer
        self._decoder_layer = torch.compile(decoder_layer) if compile_layers else decoder_layer

    def vision(self, images: Tensor) -> Tensor:
        """The tower's last states [B, 1 + patches, width] for uint8 images [B, 96, 96, 3]."""
        tower = self.model.model.vision_tower
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        x = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in tower.encoder.layers:
            a = layer.self_attn
            x = self._vision_layer(
                x,
                a.num_heads,
                [layer.layer_norm1.weight, layer.layer_norm1.bias, layer.layer_norm2.weight, layer.layer_norm2.bias],
                [t for m in (a.q_proj, a.k_proj, a.v_proj, a.out_proj) for t in (m.weight, m.bias)],
                [layer.mlp.fc1.weight, layer.mlp.fc1.bias, layer.mlp.fc2.weight, layer.mlp.fc2.bias],
            )
        return x

    def forward(
        self, vision: Tensor, batch: dict[str, Tensor], taps: tuple[int, ...] = (), cut_from: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Final text states [B, T, width] (normed), and the text states after the layers in ``taps``.

        ``cut_from``: from this layer on, text does not attend to the image (for the depth profile).
        """
        language = self.model.model.language_model
        tokens = batch["tokens"]
        num_rows, num_before = tokens.shape[0], len(self.prefix) + NUM_PATCHES
        text = language.embed_tokens(torch.cat([self.prefix.expand(num_rows, -1), tokens.long()], dim=1))
        image = self.model.model.multi_modal_projector(vision[:, 1:])
        p = len(self.prefix)
        x = torch.cat([text[:, :p], image.to(text.dtype), text[:, p:]], dim=1)
        positions = torch.cat(
            [torch.arange(num_before, device=x.device).expand(num_rows, -1), num_before + batch["position"].long()], 1
        )
        cos, sin = language.rotary_emb(x, positions)
        allowed = self.mask(batch["segment"])
        blind = allowed.clone()
        blind[:, :, num_before:, p:num_before] = False
        dtype = torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else x.dtype
        bias, blind_bias = (
            torch.zeros(m.shape, dtype=dtype, device=x.device).masked_fill_(~m, float("-inf")) for m in (allowed, blind)
        )
        states = []
        for index, layer in enumerate(language.layers):
            a, m = layer.self_attn, layer.mlp
            x = self._decoder_layer(
                x,
                bias if cut_from is None or index < cut_from else blind_bias,
                cos[:, None],
                sin[:, None],
                self.model.config.text_config.num_attention_heads,
                [layer.input_layernorm.weight, layer.post_attention_layernorm.weight],
                [w.weight for w in (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)],
            )
            if index + 1 in taps:
                states.append(x[:, num_before:])
        return language.norm(x[:, num_before:]), states

    def mask(self, segment: Tensor) -> Tensor:
        """Allowed attention [B, 1, L, L] (bool): causal, and a question sees only what precedes all and itself."""
        before = segment.new_zeros(segment.shape[0], len(self.prefix) + NUM_PATCHES)
        full = torch.cat([before, segment], dim=1)
        length = full.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
        shared = torch.arange(length, device=segment.device) < before.shape[1]
        same = full[:, :, None] == full[:, None, :]
        return ((same | shared[None, None, :]) & causal)[:, None]
