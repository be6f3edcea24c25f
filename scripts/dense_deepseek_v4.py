"""DeepSeek V4 computed for training: transformers' parameters, all experts, keys in blocks, and a loss for the indexer.

The mathematics is transformers'; shapes depend on no data, so that a step can be replayed as one CUDA graph. Its
indexer chooses entries by a hard top-k, which has no gradient: here it learns to rank entries as the layer attends to
them (DeepSeek-V3.2, section 2.1), and its inputs pass no gradient back.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from sinkhorn_training import sinkhorn
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 128
NEVER = float("-inf")


@dataclass
class Pass:
    """What one forward pass is asked, and what it leaves behind.

    window [B, 1, 1, 1] or an int: how many last tokens a layer sees next to its entries. select: the indexer's choice
    holds; else every closed entry is seen. index_weights [B, L]: how much a token counts in the indexer's loss.
    """

    window: Tensor | int = 128
    select: bool = True
    index_weights: Tensor | None = None
    index_losses: list[Tensor] = field(default_factory=list)
    routed: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    rope: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def norm(module: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], module.weight.float(), module.variance_epsilon)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last channels of x [..., L, D] in pairs by cos, sin [L, pairs]."""
    width = 2 * cos.shape[-1]
    plain, turned = x[..., :-width], x[..., -width:].unflatten(-1, (-1, 2))
    a, b = turned.unbind(-1)
    return torch.cat([plain, torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)], -1)


def hyper_weights(module: nn.Module, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The streams' weights in a block's input, of its output in each, and the mixing matrix [..., from, to]."""
    n = module.hc_mult
    with torch.autocast(streams.device.type, enabled=False):
        flat = F.rms_norm(streams.flatten(2), (streams[0, 0].numel(),), eps=module.input_norm.eps)
        pre, post, comb = F.linear(flat, module.fn).split([n, n, n * n], -1)
        bases, scales = module.base.split([n, n, n * n]), module.scale.unbind()
        pre = torch.sigmoid(pre * scales[0] + bases[0]) + module.hc_eps
        post = 2 * torch.sigmoid(post * scales[1] + bases[1])
        comb = sinkhorn((comb * scales[2] + bases[2]).unflatten(-1, (n, n)), module.hc_sinkhorn_iters, module.hc_eps)
    return pre, post, comb


def joined(weights: Tensor, streams: Tensor) -> Tensor:
    """Streams [B, L, n, H] weighted [B, L, n] and added up, [B, L, H]."""
    return torch.matmul(weights.unsqueeze(-2), streams).squeeze(-2)


def head_of(module: nn.Module, streams: Tensor) -> Tensor:
    """The streams joined for the final norm."""
    with torch.autocast(streams.device.type, enabled=False):
        flat = F.rms_norm(streams.flatten(2), (streams[0, 0].numel(),), eps=module.input_norm.eps)
        weights = torch.sigmoid(F.linear(flat, module.hc_fn) * module.hc_scale + module.hc_base) + module.eps
        return joined(weights, streams)


def entries_of(module: nn.Module, hidden: Tensor, width: int) -> Tensor:
    """The compressed entries [B, L // ratio, width] of hidden [B, L, H], before they are turned."""
    ratio = module.compress_rate
    closed = hidden[:, : hidden.shape[1] // ratio * ratio]
    values = module.kv_proj(closed).float().unflatten(1, (-1, ratio))
    gates = module.gate_proj(closed).float().unflatten(1, (-1, ratio)) + module.position_bias.float()
    if values.shape[-1] == 2 * width:
        # Entry w joins the first half of window w - 1 and the second half of window w.
        values = torch.cat([F.pad(values[:, :-1, :, :width], (0, 0, 0, 0, 1, 0)), values[..., width:]], 2)
        before = F.pad(gates[:, :-1, :, :width], (0, 0, 0, 0, 1, 0), value=NEVER)
        gates = torch.cat([before, gates[..., width:]], 2)
    return norm(module.kv_norm, (values * gates.softmax(2)).sum(2))


def index_scores(module: nn.Module, hidden: Tensor, latent: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """The indexer's score of every entry for every token, [B, L, entries]."""
    cos, sin = rope
    ratio = module.compress_rate
    keys = turn(entries_of(module, hidden, module.head_dim), *(part[::ratio][: len(part) // ratio] for part in rope))
    queries = module.q_b_proj(latent).unflatten(-1, (-1, module.head_dim)).float()
    queries = turn(queries.transpose(1, 2), cos, sin).transpose(1, 2)
    scorer = module.scorer
    scores = F.relu(torch.einsum("blhd,bed->blhe", queries, keys))
    weights = scorer.weights_proj(hidden) * (scorer.weights_scaling * scorer.softmax_scale)
    return torch.matmul(weights.unsqueeze(-2), scores).squeeze(-2).float()


def nearby(length: int, window: Tensor | int, device: torch.device) -> Tensor:
    """Which of the keys that ``local_scores`` lays out a token sees, [1 or B, 1, L, keys] bool."""
    rows = torch.arange(length, device=device)
    if length <= 2 * BLOCK:
        distance = rows[:, None] - rows[None]
        first = torch.zeros_like(distance)
    else:
        keys = torch.arange(2 * BLOCK, device=device)[None] - BLOCK
        distance = rows[:, None] % BLOCK - keys
        first = rows[:, None] // BLOCK * BLOCK + keys
    seen = (distance >= 0) & (distance < window) & (first >= 0)
    return seen.view(-1, 1, length, seen.shape[-1])


def with_previous(blocks: Tensor) -> Tensor:
    """Each block of keys [B, L, D] after the one before it: [B, L / BLOCK, 2 * BLOCK, D]."""
    parts = blocks.unflatten(1, (-1, BLOCK))
    return torch.cat([F.pad(parts[:, :-1], (0, 0, 0, 0, 1, 0)), parts], 2)


def attention(module: nn.Module, hidden: Tensor, asked: Pass) -> Tensor:
    """One layer's attention, hidden [B, L, H] -> [B, L, H]; L at most 256, or a multiple of 128."""
    batch, length, _ = hidden.shape
    rope = asked.rope[module.rope_layer_type]
    queries, latent = rotated_queries(module, hidden, rope)
    keys = turn(norm(module.kv_norm, module.kv_proj(hidden)), *rope)
    short = length <= 2 * BLOCK
    if short:
        near = torch.einsum("bhqd,bkd->bhqk", queries, keys)
    else:
        keys = with_previous(keys)
        near = torch.einsum("bhnqd,bnkd->bhnqk", queries.unflatten(2, (-1, BLOCK)), keys).flatten(2, 3)
    parts = [near.float().masked_fill(~nearby(length, asked.window, hidden.device), NEVER)]
    entries = None
    if module.compressor is not None and length >= module.compressor.compress_rate:
        entries, seen, scores = chosen_entries(module.compressor, hidden, latent, asked)
        far = torch.einsum("bhqd,bed->bhqe", queries, entries).float()
        parts.append(far.masked_fill(~seen.unsqueeze(1), NEVER))
    sinks = module.sinks.float().view(1, -1, 1, 1).expand(batch, -1, length, 1)
    shares = torch.cat([*parts, sinks], -1).softmax(-1)
    near_shares = shares[..., : near.shape[-1]]
    if short:
        out = torch.einsum("bhqk,bkd->bhqd", near_shares, keys)
    else:
        out = torch.einsum("bhnqk,bnkd->bhnqd", near_shares.unflatten(2, (-1, BLOCK)), keys).flatten(2, 3)
    if entries is not None:
        far_shares = shares[..., near.shape[-1] : -1]
        out = out + torch.einsum("bhqe,bed->bhqd", far_shares, entries)
        if scores is not None and asked.index_weights is not None:
            asked.index_losses.append(index_loss(far_shares.detach(), scores, asked.index_weights))
    return grouped_output(module, out, rope)


def rotated_queries(module: nn.Module, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Scaled queries [B, heads, L, D], and the latent row [B, L, R] that they are made of."""
    latent = norm(module.q_a_norm, module.q_a_proj(hidden))
    queries = module.q_b_proj(latent).float().unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
    queries = F.rms_norm(queries, queries.shape[-1:], eps=module.q_b_norm.eps)
    return turn(queries, *rope) * module.scaling, latent


def grouped_output(module: nn.Module, out: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Attention's output [B, heads, L, D], turned back, through both projections: [B, L, H]."""
    cos, sin = rope
    out = turn(out.float(), cos, -sin).transpose(1, 2).flatten(2)
    groups = module.o_a_proj.n_groups
    weight = module.o_a_proj.weight.unflatten(0, (groups, -1))
    return module.o_b_proj(torch.einsum("blgi,goi->blgo", out.unflatten(-1, (groups, -1)), weight).flatten(2))


def chosen_entries(
    module: nn.Module, hidden: Tensor, latent: Tensor, asked: Pass
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Entries [B, E, D], which of them each token sees [B, L, E], and the indexer's scores of those that are closed."""
    length, ratio = hidden.shape[1], module.compress_rate
    cos, sin = asked.rope["compress"]
    count = length // ratio
    entries = turn(entries_of(module, hidden, module.head_dim), cos[::ratio][:count], sin[::ratio][:count])
    closed = (torch.arange(length, device=hidden.device) + 1) // ratio
    seen = (torch.arange(count, device=hidden.device)[None] < closed[:, None])[None]
    indexer = getattr(module, "indexer", None)
    if indexer is None or not (asked.select or asked.index_weights is not None):
        return entries, seen, None
    scores = index_scores(indexer, hidden.detach(), latent.detach(), (cos, sin)).masked_fill(~seen, NEVER)
    if asked.select and count > indexer.index_topk:
        best = scores.detach().topk(indexer.index_topk, -1).indices
        seen = seen & torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    return entries, seen, scores


def index_loss(shares: Tensor, scores: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of the indexer's softmax with what all heads give each entry, shares [B, heads, L, E].

    A token counts by its weight and by how much of its attention goes to entries at all.
    """
    mass = shares.sum(1)
    counts = weights * mass.sum(-1) / shares.shape[1]
    logs = scores.masked_fill(scores == NEVER, -1e4).log_softmax(-1)
    each = -(mass * logs).sum(-1) / mass.sum(-1).clamp(min=1e-6)
    return (each * counts).sum() / counts.sum().clamp(min=1e-6)


def experts(module: nn.Module, hidden: Tensor, ids: Tensor, asked: Pass) -> Tensor:
    """Routed experts as two products over all of them, those not chosen weighted 0, and the shared one."""
    gate, flat = module.gate, hidden.flatten(0, 1)
    with torch.autocast(hidden.device.type, enabled=False):
        scores = F.softplus(F.linear(flat.float(), gate.weight.float())).sqrt()
        if module.is_hash:
            chosen = gate.tid2eid[ids.flatten()]
        else:
            chosen = (scores.detach() + gate.e_score_correction_bias).topk(gate.top_k, -1).indices
            asked.routed.append((gate, chosen))
        weights = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * gate.routed_scaling_factor
    routed = module.experts
    both = F.linear(flat, routed.gate_up_proj.flatten(0, 1)).unflatten(-1, (routed.num_experts, -1))
    gates, ups = both.chunk(2, -1)
    inner = clamped(gates, ups, routed.limit) * weights[..., None].to(both.dtype)
    out = F.linear(inner.flatten(1), routed.down_proj.transpose(0, 1).flatten(1))
    shared = module.shared_experts
    out = out + shared.down_proj(clamped(shared.gate_proj(flat), shared.up_proj(flat), shared.limit))
    return out.view_as(hidden)


def clamped(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def decoder_layer(layer: nn.Module, streams: Tensor, ids: Tensor, asked: Pass, attend: Any = attention) -> Tensor:
    """One layer over streams [B, L, n, H] in float32; ``attend`` computes its attention."""
    for hyper, before, block in (
        (layer.attn_hc, layer.input_layernorm, lambda x: attend(layer.self_attn, x, asked)),
        (layer.ffn_hc, layer.post_attention_layernorm, lambda x: experts(layer.mlp, x, ids, asked)),
    ):
        pre, post, comb = hyper_weights(hyper, streams)
        with torch.autocast(streams.device.type, enabled=False):
            given = norm(before, joined(pre, streams))
        out = block(given).float()
        with torch.autocast(streams.device.type, enabled=False):
            streams = post.unsqueeze(-1) * out.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), streams)
    return streams


class DenseDeepseekV4(nn.Module):
    """transformers' model of DeepSeek V4, computed by the functions above."""

    def __init__(self, model: Any, max_length: int) -> None:
        super().__init__()
        self.inner, self.config = model, model.config
        positions = torch.arange(max_length)[None]
        for kind in ("main", "compress"):
            cos, sin = model.model.rotary_emb(torch.zeros(1), position_ids=positions, layer_type=kind)
            self.register_buffer(f"{kind}_cos", cos[0].float(), persistent=False)
            self.register_buffer(f"{kind}_sin", sin[0].float(), persistent=False)

    def rope(self, start: int, end: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Cosines and sines [end - start, pairs] of these positions, by kind of layer."""
        tables = {kind: (getattr(self, f"{kind}_cos"), getattr(self, f"{kind}_sin")) for kind in ("main", "compress")}
        return {kind: (cos[start:end], sin[start:end]) for kind, (cos, sin) in tables.items()}

    def streams(self, ids: Tensor, asked: Pass) -> Tensor:
        """The streams [B, L, n, H] after the last layer."""
        body = self.inner.model
        asked.rope = self.rope(0, ids.shape[1])
        streams = body.embed_tokens(ids).float().unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1).contiguous()
        for layer in body.layers:
            streams = decoder_layer(layer, streams, ids, asked)
        return streams

    def logits(self, streams: Tensor) -> Tensor:
        body = self.inner.model
        return self.inner.lm_head(norm(body.norm, head_of(body.hc_head, streams))).float()

    def forward(self, ids: Tensor, asked: Pass) -> Tensor:
        """Logits [B, L, V] of ids [B, L]."""
        return self.logits(self.streams(ids, asked))
