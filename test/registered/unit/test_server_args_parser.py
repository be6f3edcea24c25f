"""Command lines and files: names, abbreviations, hints for unknown names, every problem at once."""

import argparse
import os
import tempfile
import unittest

from sglang.srt import server_args as module
from sglang.srt.arg_groups.fields import human_int
from sglang.srt.arg_groups.parse import parse, read, unknown_flag
from sglang.srt.arg_groups.upstream import MISNAMED, distinct_flags, upstream_flags
from sglang.srt.server_args import ServerArgs, ServerArgsError
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.resolved_args import errors_of
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")


class TestNames(CustomTestCase):
    def test_aliases_and_abbreviations(self):
        for line, field, value in (
            ("--model m", "model_path", "m"), ("--model-path=m", "model_path", "m"), ("--tp 8", "tp_size", 8),
            ("--tensor-parallel-size 8", "tp_size", 8), ("--tp-size=8", "tp_size", 8), ("--dp 1", "dp_size", 1),
            ("--data-parallel-size 1", "dp_size", 1), ("--ep 1", "ep_size", 1),
            ("--expert-parallel-size 1", "ep_size", 1),
            ("--chunked 64", "chunked_prefill_size", 64), ("--chunked-prefill-size -1", "chunked_prefill_size", -1),
            ("--disable-radix", "disable_radix_cache", True), ("--context-length 128k", "context_length", 128000),
            ("--stream-output", "incremental_streaming_output", True),
            ("--max-total-tokens 1Mi", "max_total_tokens", 1 << 20), ("--cuda-graph-bs 1 8", "cuda_graph_bs", [1, 8]),
            ("--mem-fraction-static .5", "mem_fraction_static", 0.5),
            ("--watchdog-timeout 5", "watchdog_timeout", 5.0),
        ):  # fmt: skip
            with self.subTest(line):
                self.assertEqual(getattr(parse(line.split()), field), value)

    def test_pp_is_no_longer_ambiguous(self):
        self.assertEqual(errors_of("--pp 1"), [])
        self.assertEqual(errors_of("--pp 2"), ["--pp 2 is refused: pipeline parallelism is not implemented"])

    def test_ambiguous_abbreviation_lists_candidates(self):
        (error,) = errors_of("--max-ru 3 --enable-d")
        self.assertTrue(error.startswith("--enable-d is ambiguous: it could be --enable-d"), error)

    def test_no_name_is_declared_twice(self):
        ours = [flag for spec in module.specs() for flag in spec.flags]
        unsupported = [name for flag in distinct_flags() for name in flag.names]
        self.assertEqual(len(set(ours + unsupported)), len(ours) + len(unsupported))
        self.assertGreater(len(ours) + len(unsupported), 400)

    def test_each_unsupported_flag_is_refused_or_has_no_effect(self):
        """By each of its names, with a value of its shape: what the table says, and no traceback."""
        number = 0
        for flag in distinct_flags():
            for name in flag.names:
                words = [name] if flag.nargs in (0, "*", "?") else [name, "7"]
                found = read(words)
                said = found.errors if flag.refused else found.warnings
                self.assertEqual((len(found.errors), len(found.warnings)), (int(flag.refused), int(not flag.refused)))
                self.assertTrue(said[0].startswith(name) and said[0].endswith(flag.reason), said)
                number += 1
                for word in flag.harmless:
                    moot = read([name, word])
                    self.assertEqual((moot.errors, moot.warnings), ([], []), (name, word))
        self.assertGreater(number, 300)

    def test_names_of_others(self):
        """vLLM's names, and what users guess: a flag that can be used, or why there is none."""
        ours = [flag for spec in module.specs() for flag in spec.flags]
        for name, meant in MISNAMED.items():
            self.assertNotIn(name, ours)
            if meant.startswith("-"):
                self.assertIn(meant.partition(" ")[0], ours, name)
                if meant.count(" "):
                    self.assertEqual(errors_of(meant), [], name)
            (error,) = errors_of([name, "8"])
            self.assertEqual(error, f"unknown flag {name}: " + (f"did you mean {meant}?" if meant[0] == "-" else meant))
        for name, flag in (
            ("--max-model-len", "--context-length"), ("--gpu-memory-utilization", "--mem-fraction-static"),
            ("--max-num-seqs", "--max-running-requests"), ("--enforce-eager", "--disable-cuda-graph"),
            ("--cpu", "--device cpu"), ("--cors", "--allowed-origins"), ("--gpu_memory_utilization=0.9",
             "--mem-fraction-static"), ("--no-enable-prefix-caching", "--disable-radix-cache"),
        ):  # fmt: skip
            self.assertTrue(errors_of(name)[0].endswith(f": did you mean {flag}?"), errors_of(name))
        self.assertIn("nothing is fetched from a hub", errors_of("--hf-token=x")[0])

    def test_a_hint_never_names_a_flag_that_cannot_be_used(self):
        """A misspelled unsupported flag gets the answer of that flag, or a supported flag as advice."""
        ours = {flag for spec in module.specs() for flag in spec.flags}
        known = [*ours, *upstream_flags()]
        for flag in distinct_flags():
            for name in flag.names:
                for wrong in (name[:-2] + name[-1] + name[-2], name[:4] + name[5:], name + "x"):
                    hint = unknown_flag(wrong, known).partition("did you mean ")[2].partition("?")[0]
                    self.assertTrue(not hint or hint in ours, f"{wrong}: {hint}")
        (error,) = errors_of("--enable-multi-layer-eagel")
        self.assertIn("--enable-multi-layer-eagle is refused: of speculative decoding, this engine has a chain", error)
        self.assertEqual(errors_of("--quant"), ["--quant is ambiguous: it could be --quantization"])
        self.assertEqual(errors_of("--wholly-unknown"), ["unknown flag --wholly-unknown: --help lists all flags"])

    def test_human_numbers(self):
        self.assertEqual([human_int(w) for w in ("4096", "25.6k", "1M", "2Ki")], [4096, 25600, 10**6, 2048])
        for word in ("1.5Ki", "k", "1e3", "", "0x10"):
            self.assertRaises(ValueError, human_int, word)

    def test_another_programs_parser(self):
        parser = argparse.ArgumentParser()
        ServerArgs.add_cli_args(parser)
        parser.add_argument("--batch-size", type=int)
        namespace = parser.parse_args("--model m --tp 2 --batch-size 3 --trust-remote-code".split())
        with self.assertLogs("sglang.srt.server_args", "WARNING"):
            args = ServerArgs.from_cli_args(namespace)
        self.assertEqual((args.model_path, args.tp_size, namespace.batch_size), ("m", 2, 3))
        with self.assertRaisesRegex(ServerArgsError, "pp 2 is refused"):
            ServerArgs.from_cli_args(parser.parse_args(["--pp", "2"]))

    def test_keywords_of_upstreams_engine(self):
        with self.assertLogs("sglang.srt.server_args", "WARNING") as logs:
            args = ServerArgs.from_kwargs(model_path="m", tp_size=2, trust_remote_code=True, quantization=None)
        self.assertEqual((args.model_path, args.tp_size), ("m", 2))
        self.assertEqual(len(logs.output), 1)
        with self.assertRaises(ServerArgsError) as caught:
            ServerArgs.from_kwargs(torchao_config="int4wo", tp_sise=2, max_model_len=8, hf_token="x", colour=1)
        *unknown, refused = caught.exception.errors
        self.assertEqual(unknown[0], "unknown setting tp_sise: did you mean tp_size?")
        self.assertEqual(unknown[1], "unknown setting max_model_len: did you mean context_length?")
        self.assertTrue(unknown[2].startswith("unknown setting hf_token: nothing is fetched"))
        self.assertEqual(unknown[3:], ["unknown setting colour"])
        self.assertIn("--torchao-config int4wo is refused", refused)


class TestConfigFile(CustomTestCase):
    def file(self, text):
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as handle:
            handle.write(text)
        self.addCleanup(os.unlink, handle.name)
        return handle.name

    def test_command_line_over_file_over_default(self):
        path = self.file(
            "model-path: /m\ntp-size: 2\nport: 31000\ndisable-radix-cache: true\nenable-mixed-chunk: false\n"
            "cuda-graph-bs: [1, 2]\njson-model-override-args: {num_hidden_layers: 2}\n"
        )
        args = parse(["--port", "31001", "--config", path])
        self.assertEqual((args.model_path, args.tp_size, args.port, args.host), ("/m", 2, 31001, "127.0.0.1"))
        self.assertEqual((args.disable_radix_cache, args.enable_mixed_chunk, args.cuda_graph_bs), (True, False, [1, 2]))
        self.assertEqual(args.model_overrides(), {"num_hidden_layers": 2})

    def test_every_problem_names_the_file(self):
        path = self.file("tp_size: 2\nport: many\npp-size: 4\ndtype:\nconfig: other.yaml\n")
        errors = errors_of(["--config", path, "--host"])
        self.assertEqual(sum(error.startswith(f"{path}: ") for error in errors), 5)
        self.assertIn(f"{path}: unknown flag --tp_size: did you mean --tp-size?", errors)
        self.assertEqual(errors[-1], "--host: expected one argument")
        for text, part in (("- a\n- b\n", "must map"), ("a: [", "not valid YAML"), ("", None)):
            errors = errors_of(["--config", self.file(text)])
            self.assertEqual([part in error for error in errors], [True] if part else [], errors)
        self.assertIn("cannot be read", errors_of("--config /nowhere/x.yaml")[0])


if __name__ == "__main__":
    unittest.main()
