"""The offline Engine over a fake engine: sync, async, streams, errors, and its end; and what importing sglang costs."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
from unittest import mock

import sglang
from sglang.srt.arg_groups.plan import LaunchPlan
from sglang.srt.entrypoints import engine as engine_module
from sglang.srt.entrypoints.context import ServerContext
from sglang.srt.managers.io_struct import FinishReason
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.server_args import ServerArgs, ServerArgsError
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_scheduler import FakeEngine
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tokenizers import byte_level_tokenizer, write_tokenizer

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

GREEDY = {"max_new_tokens": 6, "temperature": 0}
LONG = {**GREEDY, "max_new_tokens": 4000}


def start_fake(plan):
    args = plan.args
    tokenizer = Tokenizer.from_path(args.tokenizer_path)
    fake = FakeEngine(args, tokenizer)
    model = types.SimpleNamespace(context_len=64, vocab_size=tokenizer.vocab_size, hf_config={}, architecture="Fake")
    model.generation_defaults = {}
    return ServerContext(TokenizerManager(args, model, tokenizer, fake.ipc), args, model, {"from": "fake"}), fake


class TestEngine(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        folder = write_tokenizer(cls.enterClassContext(tempfile.TemporaryDirectory()), byte_level_tokenizer())
        with (
            mock.patch.object(engine_module, "start_engine", start_fake),
            mock.patch.object(engine_module, "plan_launch", LaunchPlan),
        ):
            cls.engine = sglang.Engine(model_path=folder, tokenizer_path=folder)
        cls.fake = cls.engine._processes

    @classmethod
    def tearDownClass(cls):
        cls.engine.shutdown()

    def setUp(self):
        self.fake.scheduler.delay_s = 0.0
        self.fake.scheduler.received.clear()

    def wait_for_abort(self):
        """The one request of the test is aborted; it is too long to end otherwise."""
        scheduler = self.fake.scheduler
        deadline = time.monotonic() + 60
        while (not scheduler.aborted_rids() or scheduler.running) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.assertEqual((len(scheduler.aborted_rids()), scheduler.running), (1, {}))

    def test_sync(self):
        one = self.engine.generate("hello", GREEDY)
        self.assertEqual(set(one), {"text", "output_ids", "meta_info"})
        self.assertEqual(len(one["output_ids"]), 6)
        batch = self.engine.generate(["hello", "ab"], [GREEDY, {"max_new_tokens": 2}])
        self.assertEqual([len(result["output_ids"]) for result in batch], [6, 2])
        self.assertEqual(batch[0]["text"], one["text"])
        ids = self.engine.generate(input_ids=[5, 6], sampling_params=GREEDY, return_logprob=True, rid="r")
        self.assertEqual((ids["meta_info"]["id"], len(ids["meta_info"]["output_token_logprobs"])), ("r", 6))

    def test_stream(self):
        self.fake.scheduler.delay_s = 0.003
        whole = self.engine.generate("hello world", GREEDY)["text"]
        texts = [result["text"] for result in self.engine.generate("hello world", GREEDY, stream=True)]
        self.assertEqual(texts[-1], whole)
        self.assertGreater(len(texts), 2)

    def test_leaving_a_stream_aborts(self):
        self.fake.scheduler.delay_s = 0.02
        for _ in self.engine.generate("hello", LONG, stream=True):
            break
        self.wait_for_abort()

    def test_a_stream_may_be_collected_in_the_engines_own_thread(self):
        """The garbage collector runs in any thread, and this one cannot wait for itself."""
        self.fake.scheduler.delay_s = 0.1
        held = [self.engine.generate("hello", LONG, stream=True)]
        next(held[0])
        held.append(held)  # a cycle, which only the collector finds
        collected = threading.Event()
        del held
        self.engine._loop.call_soon_threadsafe(lambda: (gc.collect(), collected.set()))
        self.assertTrue(collected.wait(20))
        self.wait_for_abort()

    def test_a_fork_may_leave_a_stream(self):
        """The engine's thread does not exist in it."""
        self.fake.scheduler.delay_s = 0.1
        stream = self.engine.generate("hello", LONG, stream=True)
        next(stream)
        child = os.fork()
        if child == 0:
            stream.close()
            os._exit(0)
        deadline = time.monotonic() + 20
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                self.fail("the child hangs")
            time.sleep(0.01)
        self.assertTrue(next(stream)["text"])
        stream.close()
        self.wait_for_abort()

    def test_async(self):
        self.fake.scheduler.delay_s = 0.002

        async def main():
            results = await asyncio.gather(*[self.engine.async_generate("hello", GREEDY) for _ in range(4)])
            stream = await self.engine.async_generate("hello", GREEDY, stream=True)
            return results, [result async for result in stream]

        results, streamed = asyncio.run(main())
        self.assertEqual({result["text"] for result in results}, {streamed[-1]["text"]})

    def test_cancelling_an_async_request_aborts(self):
        self.fake.scheduler.delay_s = 0.02

        async def main():
            task = asyncio.create_task(self.engine.async_generate("hello", LONG))
            while not self.fake.scheduler.running:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(main())
        self.wait_for_abort()

    def test_errors(self):
        for arguments, pattern in (
            ({"prompt": ""}, "empty"),
            ({"prompt": "a", "sampling_params": {"temperature": float("nan")}}, "temperature"),
            ({"prompt": 5}, "not valid"),
            ({"prompt": "a", "lora_path": "x"}, "lora_path is not supported"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                self.engine.generate(**arguments)
        with self.assertRaisesRegex(TypeError, "no option 'temprature'"):
            self.engine.generate("a", temprature=1)
        with self.assertRaises(NotImplementedError):
            self.engine.encode("a")
        self.fake.scheduler.error = FinishReason(type="abort", message="boom", status_code=503)
        self.addCleanup(setattr, self.fake.scheduler, "error", None)
        self.fake.scheduler.frozen = True
        with self.assertRaisesRegex(TimeoutError, "within 0.1 s"):
            self.engine.generate("a", request_timeout=0.1)
        self.fake.scheduler.frozen = False
        with self.assertRaisesRegex(RuntimeError, "boom"):
            self.engine.generate("a")

    def test_control(self):
        self.assertTrue(self.engine.flush_cache())
        info = self.engine.get_server_info()
        self.assertEqual((info["from"], info["internal_states"][0]["num_running_reqs"]), ("fake", 0))
        self.fake.scheduler.delay_s = 0.02
        stream = self.engine.generate("hello", {"max_new_tokens": 50}, stream=True, rid="job-1")
        next(stream)
        self.engine.abort_request("job")
        self.assertEqual(list(stream)[-1]["meta_info"]["finish_reason"]["type"], "abort")
        with self.assertRaisesRegex(ValueError, "Give rid"):
            self.engine.abort_request()

    def test_an_abort_finds_a_chat_whose_template_renders(self):
        """Before the prompt is made, the tokenizer manager has no request of this id."""
        rendering, aborted, ends = threading.Event(), threading.Event(), []

        def render(*_, **__):
            rendering.set()
            self.assertTrue(aborted.wait(20))
            return "hello"

        def whole():
            return self.engine.chat([], rid="job-2", max_tokens=50)

        def stream():
            return list(self.engine.chat([], stream=True, rid="job-2", max_tokens=50))[-1]

        self.fake.scheduler.delay_s = 0.02
        with mock.patch.object(self.engine.tokenizer_manager.tokenizer, "apply_chat_template", render):
            for work in (whole, stream):
                rendering.clear(), aborted.clear()
                caller = threading.Thread(target=lambda: ends.append(work()["choices"][0]["finish_reason"]))  # noqa: B023
                caller.start()
                self.assertTrue(rendering.wait(20))
                self.engine.abort_request("other")
                self.engine.abort_request("job")
                aborted.set()
                caller.join()
        self.assertEqual(ends, ["abort"] * 2)
        self.assertEqual(self.engine.tokenizer_manager.admission.num_requests, 0)


class TestEndOfEngine(CustomTestCase):
    def test_a_dead_child_fails_the_caller_and_shutdown_is_final(self):
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(folder, byte_level_tokenizer())
            with (
                mock.patch.object(engine_module, "start_engine", start_fake),
                mock.patch.object(engine_module, "plan_launch", LaunchPlan),
                sglang.Engine(model_path=folder, tokenizer_path=folder) as engine,
            ):
                engine._processes.scheduler.frozen = True
                engine._processes.dead = "scheduler (pid 1) ended with exit code 3"
                with self.assertRaisesRegex(RuntimeError, "exit code 3"):
                    engine.generate("hello")
            engine.shutdown()
            with self.assertRaisesRegex(RuntimeError, "shut down"):
                engine.generate("hello")

    def start(self):
        folder = write_tokenizer(self.enterContext(tempfile.TemporaryDirectory()), byte_level_tokenizer())
        with (
            mock.patch.object(engine_module, "start_engine", start_fake),
            mock.patch.object(engine_module, "plan_launch", LaunchPlan),
        ):
            return sglang.Engine(model_path=folder, tokenizer_path=folder)

    def check_ended(self, fake, thread):
        deadline = time.monotonic() + 30
        while os.path.exists(fake.ipc.directory) or thread.is_alive():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)

    def test_an_engine_that_is_dropped_ends_its_processes(self):
        engine = self.start()
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "sglang-engine")
        fake = engine._processes
        self.assertEqual(len(engine.generate("hello", GREEDY)["output_ids"]), 6)
        del engine
        gc.collect()
        self.check_ended(fake, thread)

    def test_the_last_reference_may_go_in_the_engines_own_thread(self):
        holder = [self.start()]
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "sglang-engine")
        fake, loop = holder[0]._processes, holder[0]._loop
        loop.call_soon_threadsafe(holder.clear)
        self.check_ended(fake, thread)

    def test_a_call_that_is_not_sent_yet_ends_with_the_engine(self):
        """Its prompt is still tokenized, so that no scheduler knows of it."""
        engine = self.start()
        begun, errors = threading.Event(), []

        async def prepare(*_):
            begun.set()
            await asyncio.sleep(3600)

        async def ask():
            await engine.async_generate("hello", GREEDY)

        def call(ask):
            try:
                ask()
            except RuntimeError as error:
                errors.append(str(error))

        def stream():
            next(engine.generate("hello", GREEDY, stream=True))

        with mock.patch.object(engine.tokenizer_manager, "_prepare", prepare):
            for work in (lambda: engine.generate("hello", GREEDY), stream, lambda: asyncio.run(ask())):
                begun.clear()
                threading.Thread(target=call, args=(work,), daemon=True).start()
                self.assertTrue(begun.wait(20))
            engine.shutdown()
        deadline = time.monotonic() + 20
        while len(errors) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        self.assertEqual(errors, ["The engine has been shut down."] * 3)

    def test_a_fork_of_the_callers_process_ends_nothing(self):
        engine = self.start()
        self.addCleanup(engine.shutdown)
        with mock.patch.object(engine_module.os, "getpid", return_value=1):
            engine._end.peek()[1]()
        self.assertEqual(len(engine.generate("hello", GREEDY)["output_ids"]), 6)

    def test_an_interrupt_ends_the_request_and_not_the_engine(self):
        engine = self.start()
        self.addCleanup(engine.shutdown)
        scheduler = engine._processes.scheduler
        scheduler.delay_s = 0.02
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, handler)

        def interrupt():
            while not scheduler.running:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with self.assertRaises(KeyboardInterrupt):
            engine.generate("hello", LONG)
        deadline = time.monotonic() + 30
        while scheduler.running:
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)
        self.assertEqual(len(scheduler.aborted_rids()), 1)
        self.assertEqual(len(engine.generate("hello", GREEDY)["output_ids"]), 6)

    def test_wrong_settings(self):
        with self.assertRaisesRegex(ServerArgsError, "did you mean tp_size"):
            sglang.Engine(tp_sizee=2)


class TestImport(CustomTestCase):
    def test_importing_sglang_is_cheap(self):
        code = "import sys, sglang; sglang.__version__; print({'torch', 'starlette', 'zmq'} & set(sys.modules))"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        self.assertEqual(result.stdout.strip(), "set()", result.stderr)

    def test_the_detokenizer_needs_no_torch(self):
        code = "import sys, sglang.srt.managers.detokenizer_process; print('torch' in sys.modules)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        self.assertEqual(result.stdout.strip(), "False", result.stderr)

    def test_lazy_names(self):
        self.assertIs(sglang.ServerArgs, ServerArgs)
        with self.assertRaisesRegex(AttributeError, "no attribute 'Nothing'"):
            _ = sglang.Nothing
        for name in ("function", "gen", "RuntimeEndpoint"):
            with self.assertRaisesRegex(AttributeError, f"sglang.{name} .* frontend language.*sglang.Engine"):
                getattr(sglang, name)


if __name__ == "__main__":
    unittest.main()
