"""The tokenizer manager against a fake scheduler on the real sockets: results, checks, aborts, failures."""

import asyncio
import logging
import tempfile
import types
import unittest
from unittest import mock

import msgspec

from sglang.srt.managers.admission import Place
from sglang.srt.managers.io_struct import (
    AbortReq,
    FinishReason,
    FlushCacheReqOutput,
    GenerateReqInput,
    SchedulerMessage,
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.ipc import IpcNames, Receiver, Sender
from sglang.srt.managers.request_input import RequestError, split_request
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams, sample_seed
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_scheduler import FakeEngine, fake_logprob
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tokenizers import byte_level_tokenizer, write_tokenizer

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

CONTEXT = 64


class ManagerTestCase(CustomTestCase, unittest.IsolatedAsyncioTestCase):
    dp_size = 1

    async def asyncSetUp(self):
        folder = write_tokenizer(self.enterContext(tempfile.TemporaryDirectory()), byte_level_tokenizer())
        self.tokenizer = Tokenizer.from_path(folder)
        self.args = types.SimpleNamespace(
            tokenizer_path=folder,
            incremental_streaming_output=False,
            enable_metrics=True,
            log_requests=False,
            log_requests_level=2,
            log_requests_format="text",
            allow_auto_truncate=False,
            load_balance_method="total_tokens",
            max_queued_requests=None,
            max_queued_tokens=None,
            request_timeout=None,
            grammar_backend="llguidance",
            skip_tokenizer_init=False,
            speculative_algorithm=None,
            constrained_json_disable_any_whitespace=False,
            constrained_json_whitespace_pattern=None,
        )
        model = types.SimpleNamespace(context_len=CONTEXT, vocab_size=self.tokenizer.vocab_size)
        self.engine = FakeEngine(self.args, self.tokenizer, dp_size=self.dp_size)
        self.scheduler = self.engine.scheduler
        self.manager = TokenizerManager(self.args, model, self.tokenizer, self.engine.ipc)
        await self.manager.start()
        # A socket that connects before its peer is bound retries after 0.1 s: let that pass before anything is timed.
        await self.run_one(text=["a"] * self.dp_size, sampling_params={"max_new_tokens": 1})
        for scheduler in self.engine.schedulers:
            scheduler.received.clear()

    async def asyncTearDown(self):
        await self.manager.close()
        self.engine.shutdown()

    async def run_one(self, **fields):
        return [result async for result in self.manager.generate_request(GenerateReqInput(**fields))]

    async def refused(self, pattern, **fields):
        with self.assertRaisesRegex(RequestError, pattern) as caught:
            await self.run_one(**fields)
        return caught.exception

    async def until(self, condition):
        for _ in range(6000):
            if condition():
                return
            await asyncio.sleep(0.01)
        self.fail("the condition did not come true within a minute")


class TestResults(ManagerTestCase):
    async def test_one_text(self):
        (result,) = await self.run_one(text="hello", sampling_params={"max_new_tokens": 7}, rid="me")
        ids = self.tokenizer.encode("hello")
        expected = [ids[i % len(ids)] for i in range(7)]
        self.assertEqual(result["output_ids"], expected)
        self.assertEqual(result["text"], self.tokenizer.decode(expected))
        meta = result["meta_info"]
        self.assertEqual(meta["id"], "me")
        self.assertEqual(meta["finish_reason"], {"type": "length", "length": 7})
        self.assertEqual((meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]), (len(ids), 7, 1))
        self.assertEqual(meta["weight_version"], "default")
        self.assertGreater(meta["e2e_latency"], 0)
        self.assertNotIn("output_token_logprobs", meta)

    async def test_stream_is_cumulative_and_incremental_on_demand(self):
        self.scheduler.delay_s = 0.01
        request = GenerateReqInput(text="naïve 😀 你好", sampling_params={"max_new_tokens": 30}, stream=True)
        cumulative = [r async for r in self.manager.generate_request(request)]
        deltas = [r async for r in self.manager.generate_request(request, incremental=True)]
        final = cumulative[-1]
        self.assertGreater(len(cumulative), 3)
        for earlier, later in zip(cumulative, cumulative[1:]):
            self.assertTrue(later["text"].startswith(earlier["text"]))
            self.assertEqual(later["output_ids"][: len(earlier["output_ids"])], earlier["output_ids"])
            self.assertIsNone(earlier["meta_info"]["finish_reason"])
        self.assertEqual("".join(r["text"] for r in deltas), final["text"])
        self.assertEqual(sum((r["output_ids"] for r in deltas), []), final["output_ids"])

    async def test_a_slow_reader_still_gets_the_end(self):
        self.scheduler.delay_s = 0.01
        request = GenerateReqInput(text=["ab", "cd"], sampling_params={"max_new_tokens": 9}, stream=True)
        last = {}
        async for result in self.manager.generate_request(request):
            last[result["index"]] = result
            await self.until(lambda: not self.manager.num_in_flight)
        self.assertEqual([last[i]["meta_info"]["finish_reason"]["type"] for i in (0, 1)], ["length", "length"])
        self.assertEqual([len(last[i]["output_ids"]) for i in (0, 1)], [9, 9])

    async def test_batch_n_and_indices(self):
        params = [{"max_new_tokens": 2, "n": 2}, {"max_new_tokens": 3}]
        (results,) = await self.run_one(text=["ab", "cd"], sampling_params=params, rid=["x", "y"])
        self.assertEqual([r["meta_info"]["id"] for r in results], ["x_0", "x_1", "y"])
        self.assertEqual([len(r["output_ids"]) for r in results], [2, 2, 3])
        streamed = await self.run_one(text=["ab", "cd"], sampling_params=params, stream=True)
        last = {r["index"]: r for r in streamed}
        self.assertEqual([last[i]["output_ids"] for i in range(3)], [r["output_ids"] for r in results])

    async def test_each_sample_draws_from_its_own_seed(self):
        """Sample 0 as with n = 1; every prompt of a batch counts again, with its own seed and n."""
        for stream in (False, True):
            self.scheduler.received.clear()
            params = [{"n": 3, "sampling_seed": 5}, {"n": 2, "sampling_seed": 5}, {"sampling_seed": 5}, {"n": 2}]
            params = [{"max_new_tokens": 1, **one} for one in params]
            await self.run_one(text=["ab", "cd", "ef", "gh"], sampling_params=params, stream=stream)
            sent = [message.sampling_params.sampling_seed for message in self.scheduler.received]
            derived = [sample_seed(5, 1), sample_seed(5, 2)]
            self.assertEqual(sent, [5, *derived, 5, derived[0], 5, None, None])

    async def test_logprobs(self):
        ids = self.tokenizer.encode("abc", add_special_tokens=False)
        fields = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2, "token_ids_logprob": [9]}
        params = {"max_new_tokens": 2, "ignore_eos": True}
        (result,) = await self.run_one(input_ids=ids, sampling_params=params, return_text_in_logprobs=True, **fields)
        meta = result["meta_info"]
        text = self.tokenizer.decode
        self.assertEqual(meta["input_token_logprobs"][0], (None, ids[0], text(ids[:1])))
        self.assertEqual([e[1] for e in meta["output_token_logprobs"]], result["output_ids"])
        self.assertEqual(meta["output_token_logprobs"][0][0], fake_logprob(result["output_ids"][0]))
        self.assertEqual([len(row) for row in meta["output_top_logprobs"]], [2, 2])
        self.assertIsNone(meta["input_top_logprobs"][0])
        self.assertEqual(meta["output_token_ids_logprobs"][0], [(fake_logprob(9), 9, text([9]))])
        deltas = GenerateReqInput(
            input_ids=ids, sampling_params=params, stream=True, return_logprob=True, logprob_start_len=0
        )
        chunks = [r async for r in self.manager.generate_request(deltas, incremental=True)]
        entries = sum((c["meta_info"]["output_token_logprobs"] for c in chunks), [])
        prompts = [len(c["meta_info"]["input_token_logprobs"]) for c in chunks]
        self.assertEqual(prompts, [len(ids)] + [0] * (len(chunks) - 1), "those of the prompt come once")
        self.assertEqual([(e[0], e[1], None) for e in meta["output_token_logprobs"]], entries)

    async def test_stop_string_ends_and_is_trimmed(self):
        (result,) = await self.run_one(text="one END two", sampling_params={"max_new_tokens": 50, "stop": "END"})
        self.assertEqual(result["text"], "one ")
        self.assertEqual(result["meta_info"]["finish_reason"], {"type": "stop", "matched": "END"})

    async def test_clamping(self):
        await self.run_one(text="ab", sampling_params={"max_new_tokens": None, "min_new_tokens": 3, "top_k": 10**30})
        sent = self.scheduler.received[-1].sampling_params
        self.assertEqual(sent.max_new_tokens, CONTEXT - len(self.tokenizer.encode("ab")))
        self.assertEqual(sent.top_k, self.tokenizer.vocab_size)
        await self.run_one(text="ab", sampling_params={"max_new_tokens": 10**30, "min_new_tokens": 10**29})
        sent = self.scheduler.received[-1].sampling_params
        self.assertEqual(sent.min_new_tokens, sent.max_new_tokens)

    async def test_auto_truncate_keeps_the_head(self):
        self.args.allow_auto_truncate = True
        ids = [5 + i % 50 for i in range(200)]
        await self.run_one(input_ids=ids, sampling_params={"max_new_tokens": 9})
        message = self.scheduler.received[-1]
        self.assertEqual(message.input_ids, ids[: CONTEXT - 1])
        self.assertEqual(message.sampling_params.max_new_tokens, 1)
        # What is scored, or returned with the reply, is the whole prompt.
        for fields in ({"return_logprob": True, "logprob_start_len": 0}, {"logprob_start_len": 0}):
            await self.refused("longer than the model's context length", input_ids=ids, **fields)

    async def test_long_text_says_which_bound_it_passes(self):
        await self.refused("longer than the model's context length \\(64 tokens\\)", text="word " * 50)
        await self.refused("more than 128 tokens. The model's context length is 64 tokens", text="word " * 100)
        await self.refused("has 45000 characters.* at most 768 characters", text="word " * 9000)


class TestRefusals(ManagerTestCase):
    async def test_bad_requests_never_reach_the_scheduler(self):
        vocab = self.tokenizer.vocab_size
        cases = [
            ("exactly one", {}),
            ("exactly one", {"text": "a", "input_ids": [1]}),
            ("empty", {"text": ""}),
            ("empty", {"text": []}),
            ("empty", {"text": ["a", ""]}),
            ("empty", {"input_ids": []}),
            ("empty", {"input_ids": [[1], []]}),
            ("mixture", {"input_ids": [1, [2]]}),
            (f"holds {vocab}, outside", {"input_ids": [1, vocab]}),
            ("holds -1, outside", {"input_ids": [-1]}),
            ("input \\(64 tokens\\) is longer", {"input_ids": [7] * CONTEXT}),
            ("not valid Unicode", {"text": "a\ud800"}),
            ("2 entries for 1", {"text": ["a"], "sampling_params": [{}, {}]}),
            ("sampling_params is a list", {"text": "a", "sampling_params": [{}]}),
            ("twice", {"text": ["a", "b"], "rid": ["x", "x"]}),
            ("logprob_start_len", {"input_ids": [1, 2], "return_logprob": True, "logprob_start_len": 2}),
            ("top_logprobs_num", {"text": "a", "return_logprob": True, "top_logprobs_num": -1}),
            ("token_ids_logprob", {"text": "a", "return_logprob": True, "token_ids_logprob": [vocab]}),
            ("temperature", {"text": "a", "sampling_params": {"temperature": -1}}),
            ("temperature", {"text": "a", "sampling_params": {"temperature": float("nan")}}),
            ("top_p", {"text": "a", "sampling_params": {"top_p": 0}}),
            ("n must be", {"text": "a", "sampling_params": {"n": 10**9}}),
            ("64 bits", {"text": "a", "sampling_params": {"sampling_seed": 2**63}}),
            ("logit_bias", {"text": "a", "sampling_params": {"logit_bias": {"²": 1}}}),
            ("names a token id twice", {"text": "a", "sampling_params": {"logit_bias": {"5": 1, "05": -1}}}),
            ("regex cannot be used", {"text": "a", "sampling_params": {"regex": "(a"}}),
        ]
        for pattern, fields in cases:
            with self.subTest(pattern, fields=str(fields)[:80]):
                self.assertEqual((await self.refused(pattern, **fields)).status_code, 400)
        self.assertEqual(self.scheduler.received, [])
        self.assertEqual(self.manager.num_in_flight, 0)

    async def test_without_a_tokenizer(self):
        self.manager.tokenizer = None
        await self.refused("send input_ids", text="a")
        await self.refused("stop strings need", input_ids=[5], sampling_params={"stop": "x"})

    async def test_an_abort_with_a_status_is_an_error(self):
        self.scheduler.error = FinishReason(type="abort", message="boom", status_code=503)
        error = await self.refused("boom", text="a")
        self.assertEqual(error.status_code, 503)
        await self.refused("boom", text=["a", "b"])
        self.assertEqual(self.manager.num_in_flight, 0)

    async def test_what_the_client_did_is_a_warning_once(self):
        for status, lines in ((400, ["WARNING:mine"]), (500, []), (503, [])):
            self.scheduler.error = FinishReason(type="abort", message="bo\nom", status_code=status)
            with self.subTest(status), self.assertLogs("sglang", "INFO") as logs:
                logging.getLogger("sglang").info("-")
                await self.refused("bo\nom", text="a", rid="mine")
                said = [f"{r.levelname}:{r.args[0]}" for r in logs.records if r.args]
                self.assertEqual(said, lines)
                self.assertNotIn("\n", "".join(r.getMessage() for r in logs.records))

    async def test_an_error_in_mid_stream_comes_after_what_was_sent(self):
        self.scheduler.error = FinishReason(type="abort", message="boom", status_code=500)
        with self.assertRaisesRegex(RequestError, "boom"):
            async for _ in self.manager.generate_request(GenerateReqInput(text="abc", stream=True)):
                self.fail("nothing was produced before the error")


class TestAborts(ManagerTestCase):
    async def start_stream(self, **fields):
        self.scheduler.delay_s = 0.02
        iterator = self.manager.generate_request(GenerateReqInput(text="abc", stream=True, **fields))
        await iterator.__anext__()
        return iterator

    async def test_closing_the_iterator_aborts(self):
        iterator = await self.start_stream(rid="gone")
        await iterator.aclose()
        self.assertEqual(self.manager.num_in_flight, 0)
        await self.until(lambda: not self.scheduler.running)
        self.assertEqual(len(self.scheduler.aborted_rids()), 1)

    async def test_cancelling_a_waiting_reader_aborts_the_whole_batch(self):
        self.scheduler.delay_s = 0.05
        task = asyncio.create_task(self.run_one(text=["a", "b"], sampling_params={"max_new_tokens": 60}))
        await self.until(lambda: len(self.scheduler.running) == 2)
        task.cancel()
        with self.assertRaises(asyncio.CancelledError):
            await task
        await self.until(lambda: not self.scheduler.running)
        self.assertEqual(self.manager.num_in_flight, 0)

    async def test_disconnect_ends_no_request_with_a_longer_id(self):
        short, long = await self.start_stream(rid="req1"), await self.start_stream(rid="req10")
        await short.aclose()
        rest = [r async for r in long]
        self.assertEqual(rest[-1]["meta_info"]["finish_reason"]["type"], "length")

    async def test_an_id_may_come_again_at_once(self):
        first = await self.start_stream(rid="same")
        await first.aclose()
        second = [r async for r in await self.start_stream(rid="same", sampling_params={"max_new_tokens": 5})]
        self.assertEqual(second[-1]["meta_info"]["finish_reason"], {"type": "length", "length": 5})
        self.assertEqual(second[-1]["meta_info"]["id"], "same")

    async def test_abort_by_prefix_and_abort_all(self):
        streams = [await self.start_stream(rid=rid) for rid in ("job_1", "job_2", "other")]
        with self.assertRaisesRegex(RequestError, "Give rid"):
            self.manager.abort_request("")
        self.manager.abort_request("job_")
        for stream in streams[:2]:
            self.assertEqual([r async for r in stream][-1]["meta_info"]["finish_reason"]["type"], "abort")
        self.assertEqual(self.manager.num_in_flight, 1)
        self.manager.abort_request(abort_all=True)
        self.assertEqual([r async for r in streams[2]][-1]["meta_info"]["finish_reason"]["type"], "abort")
        self.assertTrue(self.scheduler.received[-1].abort_all)

    async def test_an_abort_ends_requests_whose_prompts_are_not_tokenized_yet(self):
        encode, go_on, waiting = self.manager._encode, asyncio.Event(), []

        async def wait_and_encode(single):
            waiting.append(single.rid)
            await go_on.wait()
            return await encode(single)

        self.manager._encode = wait_and_encode
        self.scheduler.delay_s = 0.05  # so that none ends before the abort that follows it arrives
        for named, ended in (({"rid": "job"}, ["abort", "abort", "length"]), ({"abort_all": True}, ["abort"] * 3)):
            go_on.clear()
            waiting.clear()
            params = {"max_new_tokens": 5}
            calls = [
                asyncio.create_task(self.run_one(text=["a", "b"], rid=["job_1", "job_2"], sampling_params=params)),
                asyncio.create_task(self.run_one(text=["c"], rid=["other"], sampling_params=params)),
            ]
            await self.until(lambda: len(waiting) == 2)
            self.manager.abort_request(**named)
            go_on.set()
            (first,), (second,) = await asyncio.gather(*calls)
            self.assertEqual([r["meta_info"]["finish_reason"]["type"] for r in first + second], ended)
        # An abort is for what was there when it came.
        ((result,),) = await self.run_one(text=["d"], rid=["job_3"], sampling_params={"max_new_tokens": 5})
        self.assertEqual(result["meta_info"]["finish_reason"]["type"], "length")
        self.assertEqual(self.manager.num_in_flight, 0)

    async def test_an_abort_ends_a_request_whose_prompt_is_rendered_before_it_gets_here(self):
        for named, rid, ended in (({"rid": "job"}, "job_1", "abort"), ({"abort_all": True}, None, "abort"),
                                  ({"rid": "job"}, "other", "length")):  # fmt: skip
            place = Place(self.manager.admission)
            self.manager.abort_request(**named)
            request = GenerateReqInput(text="a", rid=rid, sampling_params={"max_new_tokens": 5})
            (result,) = [item async for item in self.manager.generate_request(request, place=place)]
            self.assertEqual(result["meta_info"]["finish_reason"]["type"], ended)
        self.assertEqual((self.manager.admission.places, self.manager.admission.num_requests), (set(), 0))

    async def test_a_dead_engine_ends_everything(self):
        self.scheduler.frozen = True
        waiting = asyncio.create_task(self.run_one(text="abc"))
        asking = asyncio.create_task(self.manager.get_internal_states())
        await self.until(lambda: self.scheduler.received)
        self.manager.fail(RequestError("scheduler died", 500, "InternalServerError"))
        for task in (waiting, asking):
            with self.assertRaisesRegex(RequestError, "scheduler died"):
                await task
        await self.refused("scheduler died", text="abc")
        self.assertFalse(any(isinstance(m, AbortReq) for m in self.scheduler.received))

    async def test_a_cancellation_that_comes_together_with_the_result_is_not_lost(self):
        ready = asyncio.Event()

        async def prepare(*_):
            await ready.wait()
            return [], False

        async def generate():
            return await anext(self.manager.generate_request(GenerateReqInput(text="a", request_timeout=60)))

        def answer():
            for future in self.manager._replies.values():
                future.set_result(FlushCacheReqOutput(seq=0, success=False))

        self.scheduler.frozen = True
        with mock.patch.object(self.manager, "_prepare", prepare):
            for work, finish in ((generate, ready.set), (lambda: self.manager.flush_cache(60), answer)):
                for turns in range(5):
                    task = asyncio.create_task(work())
                    await asyncio.sleep(0.01)
                    finish()
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    task.cancel()
                    await asyncio.wait({task}, timeout=5)
                    self.assertTrue(task.cancelled(), turns)
                    ready.clear()


class TestControl(ManagerTestCase):
    async def test_flush_waits_for_idle(self):
        self.assertEqual(await self.manager.flush_cache(), (True, ""))
        self.scheduler.delay_s = 0.01
        task = asyncio.create_task(self.run_one(text="abc", sampling_params={"max_new_tokens": 20}))
        await self.until(lambda: self.scheduler.running)
        success, message = await self.manager.flush_cache()
        self.assertFalse(success)
        self.assertIn("busy", message)
        self.assertEqual(await self.manager.flush_cache(timeout_s=60), (True, ""))
        await task

    async def test_internal_state_and_its_timeout(self):
        self.assertEqual((await self.manager.get_internal_states())[0]["num_running_reqs"], 0)
        self.scheduler.frozen = True
        with self.assertRaisesRegex(RequestError, "did not answer within 0.05 s"):
            await self.manager.get_internal_states(timeout_s=0.05)


class TestSeveralSchedulers(ManagerTestCase):
    dp_size = 2

    async def test_requests_go_where_the_fewest_tokens_are(self):
        for scheduler in self.engine.schedulers:
            scheduler.delay_s = 0.01
        big = asyncio.create_task(self.run_one(text="long", sampling_params={"max_new_tokens": 50}))
        await self.until(lambda: self.engine.schedulers[0].running)
        (small,) = await self.run_one(text=["a", "b"], sampling_params={"max_new_tokens": 5})
        self.assertEqual([result["meta_info"]["dp_rank"] for result in small], [1, 1])
        self.assertEqual((await big)[0]["meta_info"]["dp_rank"], 0)
        # Nothing is outstanding any more: the lowest rank again.
        self.assertEqual((await self.run_one(text="c"))[0]["meta_info"]["dp_rank"], 0)

    async def test_control_reaches_all_and_flush_needs_all(self):
        self.assertEqual(len(await self.manager.get_internal_states()), 2)
        self.engine.schedulers[1].delay_s = 0.01
        first, second = self.engine.schedulers
        tasks = [asyncio.create_task(self.run_one(text=text, rid=text, sampling_params={"max_new_tokens": n}))
                 for text, n in (("a", 1), ("b", 50))]  # fmt: skip
        await self.until(lambda: second.running and not first.running)
        success, message = await self.manager.flush_cache()
        self.assertFalse(success)
        self.assertIn("1 running", message)
        self.manager.abort_request("b")
        results = await asyncio.gather(*tasks)
        self.assertEqual(results[1][0]["meta_info"]["finish_reason"]["type"], "abort")
        self.assertEqual((first.aborted_rids(), len(second.aborted_rids())), ([], 1))
        self.assertEqual(await self.manager.flush_cache(), (True, ""))
        self.manager.abort_request(abort_all=True)
        await self.until(lambda: all(isinstance(s.received[-1], AbortReq) for s in self.engine.schedulers))


class TestWire(CustomTestCase):
    def test_messages_of_one_call_arrive_together(self):
        names = IpcNames.create()
        self.addCleanup(names.remove)
        receiver, sender = Receiver(names.schedulers[0], SchedulerMessage), Sender(names.schedulers[0])
        self.addCleanup(receiver.close)
        self.addCleanup(sender.close)
        params = SamplingParams()
        batch = [TokenizedGenerateReqInput(rid=str(i), input_ids=[i], sampling_params=params) for i in range(50)]
        sender.send(*batch)
        self.assertTrue(receiver.wait(60))
        self.assertEqual([receiver.decode(raw) for raw in receiver.recv_raw_all()], batch)

    def test_the_native_body_decodes(self):
        body = b'{"input_ids": [[1, 2], [3]], "token_ids_logprob": [1]}'
        obj = msgspec.json.decode(body, type=GenerateReqInput)
        singles, is_list = split_request(obj)
        self.assertEqual([s.input_ids for s in singles], [[1, 2], [3]])
        self.assertEqual([s.token_ids_logprob for s in singles], [[1], [1]])
        self.assertTrue(is_list)

    def test_the_limit_of_a_call_counts_samples_however_they_are_written(self):
        for n in (4, 4.0, "4"):
            given = GenerateReqInput(text=["a"] * 3, sampling_params={"n": n})
            self.assertEqual(len(split_request(given, 12)[0]), 3)
            for params in ({"n": n}, [{"n": n}, {"n": n}, {"n": n}]):
                with self.assertRaisesRegex(RequestError, "asks for 12 answers"):
                    split_request(GenerateReqInput(text=["a"] * 3, sampling_params=params), 11)

    def test_the_longest_numbers_that_pass_fit_the_wire(self):
        params = SamplingParams.from_request({"sampling_seed": -(2**63), "stream_interval": 2**63 - 1})
        params.verify(10)
        message = TokenizedGenerateReqInput(rid="r", input_ids=[1], sampling_params=params)
        encoded = msgspec.msgpack.encode(message)
        self.assertEqual(msgspec.msgpack.decode(encoded, type=TokenizedGenerateReqInput), message)


if __name__ == "__main__":
    unittest.main()
