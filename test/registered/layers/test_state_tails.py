"""States with tails by brute force: any accepted counts, snapshots and reuse of slots, against tokens one by one."""

import random
import unittest
from types import SimpleNamespace

import torch

from sglang.kernels.ops.gdn.decode_step import gdn_decode_step_torch
from sglang.srt.configs.cache_layout import STATE, CacheLayout
from sglang.srt.layers.attention.base_attn_backend import UnplannedStepError
from sglang.srt.layers.attention.hybrid_linear_attn_backend import GDNBackend
from sglang.srt.mem_cache.memory_pool import ModelPools, StateSlots
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode, StepKind, StepPlan
from sglang.test.cache_pools import pool_spec
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.op_cases.gdn import step_inputs
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

SHAPE = (1, 2, 8, 8, 4)  # key heads, value heads per key head, K, V, W
VOCAB = 5
LAYERS = (0, 2)


class Sequence:
    """The tokens of a slot's state, its tail included; ``verified``: the tail may have rows."""

    def __init__(self, slot, tokens=(), verified=False):
        self.slot, self.tokens, self.verified = slot, list(tokens), verified


class Server:
    """Two layers whose inputs are a function of the token, on slots that are handed out, copied and given back."""

    def __init__(self, case, seed, rows):
        self.case, self.rng, self.rows = case, random.Random(seed), rows
        generator = torch.Generator().manual_seed(seed)
        heads = SHAPE[0] * SHAPE[1]
        channels = 2 * SHAPE[0] * SHAPE[2] + heads * SHAPE[3]
        self.tables, self.layers = {}, {}
        for layer_id in LAYERS:
            *table, conv_weight, A_log, dt_bias, norm, self.conv, self.ssm = step_inputs(VOCAB, 2, SHAPE, generator)
            self.tables[layer_id] = table
            self.layers[layer_id] = SimpleNamespace(
                layer_id=layer_id, num_v_heads=heads, head_v_dim=SHAPE[3], conv_weight=conv_weight, A_log=A_log,
                dt_bias=dt_bias, norm=SimpleNamespace(weight=norm, eps=1e-6),
            )  # fmt: skip
        states = {"conv": (channels, SHAPE[4] - 1), "ssm": (heads, SHAPE[3], SHAPE[2])}
        tails = {"qkv": (rows, channels), "gates": (rows, 2 * heads), "len": ()}
        layout = CacheLayout((
            pool_spec("gdn", STATE, LAYERS, states, torch.float32),
            pool_spec("gdn_tail", STATE, LAYERS, tails, torch.float32, torch.float32, torch.int64),
        ))  # fmt: skip
        pools = ModelPools(layout, {STATE: 6}, 1, "cpu")
        self.slots = StateSlots(pools)
        self.backend = GDNBackend(pools["gdn"], torch.device("cpu"), pools["gdn_tail"])
        for buffer in pools.buffers():  # what earlier owners left
            buffer.fill_(7) if buffer.is_floating_point() else buffer.fill_(rows)
        self.running, self.kept, self.counts = [], [], {}

    def count(self, name):
        self.counts[name] = self.counts.get(name, 0) + 1

    def one_by_one(self, layer_id, tokens):
        """Output rows of ``tokens`` from an empty state, one step each."""
        conv, ssm = torch.zeros(2, *self.conv.shape[1:]), torch.zeros(2, *self.ssm.shape[1:])
        layer, slot = self.layers[layer_id], torch.ones(1, dtype=torch.int64)
        parameters = (layer.conv_weight, layer.A_log, layer.dt_bias, layer.norm.weight)
        out = [
            gdn_decode_step_torch(*(t[[token]] for t in self.tables[layer_id]), *parameters, conv, ssm, slot, 1e-6)
            for token in tokens
        ]
        return torch.cat(out)

    def run(self, sequences, new, kind):
        """Outputs of one step with the new tokens of each sequence, and of the same tokens one by one."""
        lengths = [len(tokens) for tokens in new]
        slots = torch.tensor([sequence.slot for sequence in sequences])
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        forward_batch = ForwardBatch(
            forward_mode=ForwardMode.EXTEND if kind is None else ForwardMode.TARGET_VERIFY,
            batch_size=len(sequences), input_ids=None, positions=slots, req_pool_indices=slots, seq_lens=slots,
            seq_lens_cpu=lengths, out_cache_loc=slots, attn_backend=None, num_token_non_padded=slots,
            num_token_non_padded_cpu=sum(lengths), kind=kind, state_slot_ids=slots, extend_seq_lens_cpu=lengths,
            extend_start_loc_cpu=starts[:-1],
        )  # fmt: skip
        forward_batch.attn_plan = StepPlan(None, self.backend.plan_states(forward_batch))
        ids = [token for tokens in new for token in tokens]
        for layer_id, layer in self.layers.items():
            qkv, z, b, a = (table[ids] for table in self.tables[layer_id])
            found = self.backend.forward_gdn(qkv, z.flatten(1), b, a, layer, forward_batch)
            for sequence, tokens, rows in zip(sequences, new, found.split(lengths), strict=True):
                if sequence.slot == 0:
                    continue
                wanted = self.one_by_one(layer_id, sequence.tokens + tokens)[len(sequence.tokens) :]
                torch.testing.assert_close(rows, wanted, atol=2e-5, rtol=2e-5)

    def tokens(self, number):
        return [self.rng.randrange(VOCAB) for _ in range(number)]

    def admit(self):
        """A new sequence, or one that continues from a snapshot."""
        source = self.rng.choice([None, *self.kept])
        slot = self.slots.alloc(zero=source is None)
        if slot is None:
            return
        if source is not None:
            self.slots.copy(source.slot, slot)
            self.count("hit")
        self.running.append(Sequence(slot, *([] if source is None else [source.tokens, source.verified])))

    def prefill(self):
        fresh = [sequence for sequence in self.running if not sequence.verified]
        if not fresh:
            return
        batch = self.rng.sample(fresh, self.rng.randint(1, len(fresh)))
        new = [self.tokens(self.rng.choice([1, 2, 9])) for _ in batch]
        self.run(batch, new, None)
        for sequence, tokens in zip(batch, new, strict=True):
            sequence.tokens += tokens

    def verify(self):
        if not self.running:
            return
        batch = self.rng.sample(self.running, self.rng.randint(1, len(self.running)))
        new = [self.tokens(self.rows) for _ in batch]
        self.run(batch, new, StepKind("verify", self.rows))
        accepted = [self.rng.randint(1, self.rows) for _ in batch]
        slots = torch.tensor([sequence.slot for sequence in batch])
        self.backend.update_mamba_state_after_mtp_verify(slots, torch.tensor(accepted))
        for sequence, tokens, number in zip(batch, new, accepted, strict=True):
            sequence.tokens += tokens[:number]
            sequence.verified = True
            self.count("accepted" if number > 1 else "rejected")

    def keep(self):
        """A snapshot at any time: the tail belongs to it."""
        slot = self.slots.alloc(zero=False) if self.running else None
        if slot is not None:
            source = self.rng.choice(self.running)
            self.slots.copy(source.slot, slot)
            self.kept.append(Sequence(slot, source.tokens, source.verified))
            self.count("snapshot with a tail" if source.verified else "snapshot")

    def leave(self):
        for owner in (self.running, self.kept):
            if len(owner) > 1:
                gone = self.rng.choice(owner)
                owner.remove(gone)
                self.slots.free(gone.slot)
                self.count("left")

    def mistake(self):
        """A prompt's chunk after a verify step would skip the tail: it raises."""
        tailed = [sequence for sequence in self.running if sequence.verified]
        if tailed:
            with self.case.assertRaisesRegex(AssertionError, "would skip rows of a verify step"):
                self.run([self.rng.choice(tailed)], [self.tokens(3)], None)
            self.count("mistake")


class TestTails(CustomTestCase):
    def test_any_schedule(self):
        for rows in (2, 4):
            server = Server(self, seed=rows, rows=rows)
            actions = [server.admit, server.keep, server.leave, server.prefill, server.verify, server.verify]
            for number in range(250):
                server.rng.choice([*actions, server.mistake] if number % 8 == 0 else actions)()
            for event in ("hit", "accepted", "rejected", "snapshot", "snapshot with a tail", "left", "mistake"):
                self.assertGreater(server.counts.get(event, 0), 2, event)

    def test_a_step_of_another_number_of_rows_is_refused(self):
        server = Server(self, seed=0, rows=3)
        server.admit()
        with self.assertRaisesRegex(UnplannedStepError, "4 rows per request, for tails of 3"):
            server.run(server.running, [[1, 2, 3, 4]], StepKind("verify", 4))

    def test_padding_changes_no_slot_of_a_request(self):
        """Sequences of slot 0, as a captured step has them after its requests."""
        server = Server(self, seed=1, rows=3)
        for _ in range(2):
            server.admit()
        mine, other = server.running
        buffers = [*server.backend.state_pool.buffers(), *server.backend.tail_pool.buffers()]
        before = [buffer[:, other.slot].clone() for buffer in buffers]
        for number in (2, 1, 3):
            new = [server.tokens(3), [4, 4, 4], [1, 1, 1]]
            server.run([mine, Sequence(0), Sequence(0)], new, StepKind("verify", 3))
            slots = torch.tensor([mine.slot, 0, 0])
            server.backend.update_mamba_state_after_mtp_verify(slots, torch.tensor([number, 3, 3]))
            mine.tokens += new[0][:number]
        for buffer, old in zip(buffers, before, strict=True):
            self.assertTrue(torch.equal(buffer[:, other.slot], old))


if __name__ == "__main__":
    unittest.main()
