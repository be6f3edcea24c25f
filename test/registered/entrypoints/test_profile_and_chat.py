"""A real engine from Python: traces of its steps, and the next turn of a conversation."""

import asyncio
import errno
import gzip
import json
import os
import resource
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import sglang
from sglang.srt.arg_groups.plan import LaunchPlan
from sglang.srt.entrypoints.launch import check_plan
from sglang.srt.managers.io_struct import ProfileReqInput
from sglang.srt.managers.step_profiler import StepProfiler, folder_problem
from sglang.srt.server_args import ServerArgs, ServerArgsError
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import FakeServerTestCase
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="stage-b-test-cpu")

ASKED = [{"role": "user", "content": "27+58="}]
GREEDY = {"temperature": 0, "max_new_tokens": 8}


class TestEngine(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.folder = f"{folder}/new"
        cls.engine = sglang.Engine(profile_dir=cls.folder)
        cls.addClassCleanup(cls.engine.shutdown)

    def names(self, path):
        """Events of a trace."""
        with gzip.open(path, "rt") as file:
            return {event.get("name") for event in json.load(file)["traceEvents"]}

    def test_a_profile_until_it_is_stopped(self):
        (file,) = self.engine.start_profile(profile_prefix="mine", record_shapes=True)
        self.assertTrue(Path(file).name.startswith("mine-") and "TP0" in file, file)
        with self.assertRaisesRegex(ValueError, "runs already"):
            self.engine.start_profile()
        self.engine.generate("27+58=", GREEDY)
        self.assertEqual(self.engine.stop_profile(), [file])
        self.assertIn("aten::mm", self.names(file))
        with self.assertRaisesRegex(ValueError, "No profile runs"):
            self.engine.stop_profile()

    def test_a_profile_of_some_steps(self):
        (file,) = self.engine.start_profile(num_steps=2, activities=["CPU"])
        ends = time.monotonic() + 60
        while not Path(file).exists() and time.monotonic() < ends:
            self.engine.generate("27+58=", GREEDY)
        with self.assertRaisesRegex(ValueError, "No profile runs"):
            self.engine.stop_profile()
        self.assertIn("aten::mm", self.names(file))

    def test_a_folder_that_went_away(self):
        Path(self.folder).rename(f"{self.folder}-away")
        Path(self.folder).write_text("a file")
        with self.assertRaisesRegex(ValueError, "profile-dir .* cannot be written to"):
            self.engine.start_profile()
        Path(self.folder).unlink()
        Path(f"{self.folder}-away").rename(self.folder)

    def test_chat(self):
        reply = self.engine.chat(ASKED, temperature=0)
        self.assertEqual(reply["object"], "chat.completion")
        self.assertEqual(reply["choices"][0]["message"]["content"], "85")
        self.assertEqual(reply["usage"]["completion_tokens"], 3)
        chunks = list(self.engine.chat(ASKED, temperature=0, stream=True))
        self.assertEqual("".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks), "85")

        async def both():
            reply = await self.engine.async_chat(ASKED, temperature=0, n=2)
            chunks = [chunk async for chunk in await self.engine.async_chat(ASKED, temperature=0, stream=True)]
            return len(reply["choices"]), chunks[-1]["choices"][0]["finish_reason"]

        self.assertEqual(asyncio.run(both()), (2, "stop"))

    def test_chat_refuses(self):
        for error, fields in (
            (TypeError, {"temprature": 1}),
            (ValueError, {"temperature": "hot"}),
            (ValueError, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ):
            with self.assertRaises(error):
                self.engine.chat(ASKED, **fields)
            with self.assertRaises(error):
                list(self.engine.chat(ASKED, stream=True, **fields))
        with self.assertRaises(ValueError):
            self.engine.chat("27+58=")


class TestHttp(FakeServerTestCase):
    settings = {"profile_dir": "/tmp"}

    def test_bodies_that_are_refused(self):
        for body, said in (
            ({"num_steps": 0}, "num_steps"),
            ({"activities": []}, "activities"),
            ({"activities": ["RPD"]}, "activities"),
            ({"output_dir": "/etc"}, "output_dir"),
            ({"profile_by_stage": True}, "profile_by_stage"),
            ({"start_step": 3}, "start_step"),
            ({"profile_prefix": "../x"}, "profile_prefix"),
        ):
            reply = self.client.post("/start_profile", json=body)
            self.assertEqual((reply.status_code, reply.json()["param"]), (400, said), body)


class TestWithoutFolder(FakeServerTestCase):
    def test_no_folder(self):
        for reply in (self.client.post("/start_profile"), self.client.get("/start_profile")):
            self.assertEqual(reply.status_code, 400)
            self.assertIn("--profile-dir", reply.json()["message"])


class TestFolder(CustomTestCase):
    def test_a_launch_with_a_folder_that_cannot_be_written(self):
        with tempfile.NamedTemporaryFile() as file:
            folder = f"{file.name}/below"
            self.assertIn("Not a directory", folder_problem(folder))
            with self.assertRaisesRegex(ServerArgsError, "--profile-dir"):
                check_plan(LaunchPlan(ServerArgs(profile_dir=folder)))

    def test_a_failure_leaves_the_profiler_usable(self):
        with tempfile.TemporaryDirectory() as folder:
            profiler = StepProfiler(folder, "TP1", lambda: 0)
            start = ProfileReqInput(seq=1, starts=True, name="a", activities=["CPU"])
            with mock.patch("sglang.srt.managers.step_profiler.profile", side_effect=RuntimeError("no room")):
                reply = profiler.handle(start)
            self.assertEqual((reply.success, reply.message), (False, "The profile failed: no room."))
            with mock.patch("torch.profiler.profile.start", side_effect=RuntimeError("taken")):
                self.assertIn("taken", profiler.handle(start).message)
            gpu = ProfileReqInput(seq=1, starts=True, name="a", activities=["GPU"])
            self.assertIn("runs on none", profiler.handle(gpu).message)
            self.assertTrue(profiler.handle(start).success)
            with mock.patch("torch.profiler.profile.export_chrome_trace", side_effect=OSError("disk full")):
                self.assertIn("disk full", profiler.handle(ProfileReqInput(seq=2, starts=False)).message)
            self.assertTrue(profiler.handle(start).success)
            self.assertTrue(profiler.handle(ProfileReqInput(seq=2, starts=False)).success)

    def test_a_full_disk_is_told(self):
        """Of torch's own file and of the compressed one: no part of either stays."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        for most_bytes, said in ((1000, "torch could not write all of"), (None, "No space left")):
            with tempfile.TemporaryDirectory() as folder, self.subTest(most_bytes):
                profiler = StepProfiler(folder, "TP0", lambda: 0)
                profiler.handle(ProfileReqInput(seq=1, starts=True, name="a", activities=["CPU"]))
                full = None if most_bytes else OSError(errno.ENOSPC, "No space left on device")
                with mock.patch("shutil.copyfileobj", side_effect=full):
                    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes or limits[0], limits[1]))
                    reply = profiler.handle(ProfileReqInput(seq=2, starts=False))
                    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                self.assertFalse(reply.success)
                self.assertIn(said, reply.message)
                self.assertEqual(os.listdir(folder), [])


if __name__ == "__main__":
    unittest.main()
