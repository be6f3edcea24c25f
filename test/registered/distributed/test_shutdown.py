"""How two ranks end: together and without output on request; alone and with one line if the other is gone."""

import os
import signal
import subprocess
import sys
import time
import unittest

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.distributed.parallel_state import is_lost_peer
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers.scheduler_process import LOST_PEER
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=30, suite="stage-b-test-cpu")

GROUPS = {"dp_size": 2, "enable_dp_attention": True, "moe_a2a_backend": "mori"}
# A planted end of the second rank, in the middle of a reply.
SIGNALS = {"killed": signal.SIGKILL, "stuck": signal.SIGSTOP}


def serve(mode: str) -> None:
    """Start two ranks, take a reply, end the engine, and print the ranks' exit statuses."""
    settings = GROUPS if "groups" in mode else {}
    with Engine(
        model_path=str(EMBEDDED_MODELS["deepseek-v3-tiny"]), tp_size=2, skip_server_warmup=True, log_level="info",
        **settings,
    ) as engine:  # fmt: skip
        reply = engine.generate("27+58=", {"max_new_tokens": 2000, "ignore_eos": True}, stream=True)
        next(reply)
        began = time.perf_counter()
        ranks = [child.popen for child in engine._processes.processes if "TP" in child.name]
        for name in SIGNALS.keys() & mode.split():
            os.kill(ranks[1].pid, SIGNALS[name])
        if "killed" in mode and "at once" not in mode:
            try:
                list(reply)
            except RuntimeError as error:
                print(f"told: {error}", flush=True)
    print("statuses", [rank.returncode for rank in ranks])
    print(f"ended in {time.perf_counter() - began:.1f} s")


class TestShutdown(CustomTestCase):
    def ended(self, mode: str) -> str:
        """Everything that was printed; the ranks share the output."""
        command = [sys.executable, __file__, mode]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=90, env=environment
        )
        self.assertEqual(done.returncode, 0, done.stdout)
        for noise in ("Traceback", "recvValue", "GLHF", "destroy_process_group", "terminate called"):
            self.assertNotIn(noise, done.stdout)
        return done.stdout

    def test_ranks_leave_together(self) -> None:
        for mode in ("tensor parallel", "groups"):
            with self.subTest(mode):
                found = self.ended(mode)
                self.assertIn("statuses [0, 0]", found)
                self.assertEqual(found.count("left the groups of ranks"), 2)

    def test_the_rank_that_is_left_says_one_line_and_the_launcher_names_the_other(self) -> None:
        found = self.ended("killed groups")
        self.assertEqual(found.count(LOST_PEER), 1)
        self.assertRegex(found, rf"DP0 TP0\] {LOST_PEER}")
        self.assertRegex(found, r"told: .*DP1 TP1 \(pid \d+\) was ended by signal 9")
        self.assertIn("statuses [1, -9]", found)

    def test_a_lost_rank_does_not_hold_up_the_end(self) -> None:
        self.assertIn("statuses [1, -9]", self.ended("killed at once"))
        # Inside a collective the rank that is left does not hear the signal, and the launcher insists.
        self.assertRegex(self.ended("stuck"), r"statuses \[(1|-9), -9\]\n.*ended in \d\.\d s")

    def test_which_errors_tell_of_a_lost_peer(self) -> None:
        self.assertTrue(is_lost_peer(RuntimeError("gloo/transport/tcp/pair.cc:547] Connection closed by peer")))
        self.assertTrue(is_lost_peer(RuntimeError("NCCL error: remote process exited or there was a network error")))
        self.assertFalse(is_lost_peer(RuntimeError("CUDA out of memory")))
        self.assertFalse(is_lost_peer(ConnectionResetError("Connection reset by peer")))


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].split()[0] in {"tensor", "groups", *SIGNALS}:
        serve(sys.argv[1])
    else:
        unittest.main()
