"""Sharded linear layers hold the rows and columns of the whole matrix that their rank owns."""

import unittest
from unittest import mock

import torch

from sglang.srt.configs.deepseek import DeepseekConfig
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.layers.weights import WeightShapeError, join_rows
from sglang.srt.models.deepseek_common.attention import DeepseekV2AttentionMLA
from sglang.srt.utils.multi_stream_utils import StreamOverlap
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.published_sizes import DEEPSEEK_V2_LITE
from sglang.test.test_utils import CustomTestCase
from sglang.test.thread_ranks import override_tp_group, run_ranks, thread_ranks

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")


def on_ranks(size, build):
    layers = []
    for handle in thread_ranks(size):
        with override_tp_group(handle):
            layers.append(build())
    return layers


def load(layer, tensor, shard_id=None):
    layer.weight.weight_loader(layer.weight, tensor, shard_id)


class TestShards(CustomTestCase):
    def setUp(self):
        self.generator = torch.Generator().manual_seed(0)

    def random(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def test_column_then_row_is_the_whole_product(self):
        up, down, x = self.random(12, 8), self.random(6, 12), self.random(5, 8)
        columns = on_ranks(3, lambda: ColumnParallelLinear(8, 12))
        rows = on_ranks(3, lambda: RowParallelLinear(12, 6, bias=True))
        bias = self.random(6)
        for column, row in zip(columns, rows):
            load(column, up)
            load(row, down)
            row.bias.weight_loader(row.bias, bias, None)
        for found in run_ranks(lambda pair: pair[1](pair[0](x)), list(zip(columns, rows))):
            torch.testing.assert_close(found, x @ up.T @ down.T + bias)

    def test_merged_columns_one_by_one_and_stacked(self):
        parts, x = [self.random(4, 8), self.random(6, 8), self.random(2, 8)], self.random(3, 8)
        by_one = on_ranks(2, lambda: MergedColumnParallelLinear(8, [4, 6, 2]))
        stacked = on_ranks(2, lambda: MergedColumnParallelLinear(8, [4, 6, 2]))
        for rank, (one, other) in enumerate(zip(by_one, stacked)):
            for shard_id, part in enumerate(parts):
                load(one, part, shard_id)
            load(other, torch.cat(parts[:2]), (0, 1))
            load(other, parts[2], 2)
            expected = torch.cat([x @ part.chunk(2)[rank].T for part in parts], dim=-1)
            torch.testing.assert_close(one(x), expected)
            torch.testing.assert_close(other(x), expected)

    def test_key_heads_are_repeated_when_ranks_outnumber_them(self):
        q, k, v = self.random(4 * 2 * 3, 8), self.random(2 * 3, 8), self.random(2 * 3, 8)
        for rank, layer in enumerate(on_ranks(4, lambda: QKVParallelLinear(8, 3, 4, 2, q_multiplier=2))):
            for shard_id, part in (("q", q), ("k", k), ("v", v)):
                load(layer, part, shard_id)
            own = slice(3 * (rank // 2), 3 * (rank // 2) + 3)
            torch.testing.assert_close(layer.weight.data, torch.cat((q[6 * rank : 6 * rank + 6], k[own], v[own])))
            self.assertEqual((layer.num_heads, layer.num_kv_heads), (1, 1))

    def test_vocabulary_of_unequal_shares(self):
        table, ids = self.random(7, 4), torch.tensor([0, 2, 3, 6, 6])
        embeddings, heads = on_ranks(3, lambda: VocabParallelEmbedding(7, 4)), on_ranks(3, lambda: ParallelLMHead(7, 4))
        for layer in (*embeddings, *heads):
            layer.weight.data.fill_(float("nan"))
            load(layer, table)
        for found in run_ranks(lambda layer: layer(ids), embeddings):
            torch.testing.assert_close(found, table[ids])
        for found in run_ranks(lambda layer: layer(table), heads):
            torch.testing.assert_close(found, table @ table.T)

    def test_misfits_are_refused(self):
        layer = MergedColumnParallelLinear(8, [4, 6])
        with self.assertRaises(WeightShapeError):
            load(layer, torch.zeros(6, 8), 0)
        with self.assertRaises(WeightShapeError):
            load(RowParallelLinear(8, 4), torch.zeros(8, 4))
        for build in (
            lambda: ColumnParallelLinear(8, 10),
            lambda: RowParallelLinear(10, 8),
            lambda: QKVParallelLinear(8, 4, 6, 2),
        ):
            with self.assertRaisesRegex(ValueError, "split over 4"):
                on_ranks(4, build)
        with self.assertRaises(ValueError):
            RowParallelLinear(8, 4, reduce_results=False, bias=True)


class TestJoinedRows(CustomTestCase):
    def test_parameters_become_rows_of_one_matrix(self):
        params = [torch.nn.Parameter(torch.randn(rows, 6), requires_grad=False) for rows in (3, 2)]
        joined = join_rows(*params)
        self.assertEqual((joined.shape, joined[5:].tolist()), ((8, 6), [[0.0] * 6] * 3))
        for number, param in enumerate(params, 1):
            param.copy_(torch.full_like(param, number))  # as a loader writes
        self.assertEqual(joined[:5, 0].tolist(), [1.0, 1.0, 1.0, 2.0, 2.0])

    def attention(self, heads_on_rank, **keys):
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
                 "qk_rope_head_dim": 4, "v_head_dim": 8, "q_lora_rank": None}  # fmt: skip
        config = DeepseekConfig.from_hf({**DEEPSEEK_V2_LITE, **sizes, **keys})
        with override_tp_group(thread_ranks(4 // heads_on_rank)[0]):
            layer = DeepseekV2AttentionMLA(config, 0, mock.Mock())
        for param in layer.parameters():
            param.data.copy_(torch.randn(param.shape))
        return layer

    def test_queries_and_latents_are_one_product(self):
        """Only for plain checkpoints: if there is a bias, only one of the two has a part of it."""
        for heads_on_rank in (4, 1):
            for keys, is_joined in (({}, True), ({"attention_bias": True}, False), ({"q_lora_rank": 8}, False)):
                layer = self.attention(heads_on_rank, **keys)
                self.assertEqual(layer._q_and_kv_a is not None, is_joined)
                layer.split_kv_b()
                hidden = torch.randn(3, 32)
                if "q_lora_rank" not in keys:
                    q, kv_a = layer._project(hidden)
                    torch.testing.assert_close(q, layer.q_proj(hidden).view(3, heads_on_rank, 12))
                    torch.testing.assert_close(kv_a, layer.kv_a_proj_with_mqa(hidden))

    def test_a_weight_that_left_the_joined_matrix_is_refused(self):
        layer = self.attention(4)
        layer.q_proj.weight.data = layer.q_proj.weight.data.clone()
        with self.assertRaisesRegex(RuntimeError, "was given new memory"):
            layer.split_kv_b()


class TestOverlap(CustomTestCase):
    def test_serial_form_runs_the_side_first_and_keeps_the_order_of_results(self):
        calls = []
        out = StreamOverlap().fork_join(
            lambda: calls.append("side") or 1, lambda: calls.append("main") or 2, num_tokens=3
        )
        self.assertEqual((out, calls), ((1, 2), ["side", "main"]))


if __name__ == "__main__":
    unittest.main()
