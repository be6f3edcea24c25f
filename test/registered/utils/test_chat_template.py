"""What reaches the prompt: messages under templates of six styles, against transformers; losses, names and limits."""

import copy
import json
import tempfile
import time
import unittest
from unittest import mock

from sglang.srt.utils.chat_messages import ChatTemplateError
from sglang.srt.utils.chat_template import ChatTemplate
from sglang.srt.utils.limits import MAX_CHAT_TEMPLATE_CHARS
from sglang.test.chat_templates import STYLES
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tokenizers import byte_level_tokenizer, write_tokenizer

register_cpu_ci(est_time=25, suite="stage-a-test-cpu")

CALLS = "{%% for m in messages %%}{{ m.content }}{%% for c in m.tool_calls %%}{{ %s }}{%% endfor %%}{%% endfor %%}"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MAPPING_STYLES = ("qwen3-coder", "qwen3.5")


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, dict(SPECIAL))


TEMPLATES = {name: template(source) for name, source in STYLES.items()}


def text(role: str, content, **more):
    return {"role": role, "content": content, **more}


def parts(*texts: str):
    return [{"type": "text", "text": part} for part in texts]


def call(arguments, name="look_up", number=1):
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def history(arguments='{"key": "a", "depth": {"min": 1}}', content=None):
    """As OpenAI's client hands it back: null next to tool calls, arguments as JSON text, every optional key null."""
    asked = {"role": "assistant", "content": content, "refusal": None, "annotations": None, "audio": None,
             "function_call": None, "tool_calls": [call(arguments)]}  # fmt: skip
    return [
        text("system", "Be brief."),
        text("user", "What is a?"),
        asked,
        {"role": "tool", "tool_call_id": "call00001", "content": "a is 3"},
        {"role": "assistant", "content": "It is 3.", "tool_calls": None, "refusal": None},
        text("user", "And b?"),
    ]


class TestAgainstTransformers(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(folder, byte_level_tokenizer())
            cls.theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def expected(self, style, messages, **options):
        return self.theirs.apply_chat_template(
            messages, chat_template=STYLES[style], tokenize=False, add_generation_prompt=True, **options
        )

    def test_plain_conversations_with_thoughts_and_switches(self):
        thought = "<think>\nhm\n</think>\n\nYes. "
        messages = [
            text("system", " Be <brief>. "),
            text("user", "one\n"),
            text("assistant", thought),
            text("user", "2"),
        ]
        for style, ours in TEMPLATES.items():
            for variables in ({}, {"enable_thinking": False}, {"thinking": True}):
                with self.subTest(style=style, variables=variables):
                    got = ours.render(messages, variables=variables)
                    self.assertEqual(got, self.expected(style, messages, **variables))

    def test_reasoning_that_clients_send_back_under_other_names(self):
        for key in ("reasoning_content", "thinking", "reasoning"):
            messages = [text("user", "1"), text("assistant", "yes", **{key: "hm"})]
            for style in ("qwen3", "qwen3.5"):
                with self.subTest(style=style, key=key):
                    got = TEMPLATES[style].render(messages, add_generation_prompt=False)
                    expected = self.theirs.apply_chat_template(messages, chat_template=STYLES[style], tokenize=False)
                    self.assertEqual(got, expected)
                    self.assertIn("hm", got)

    def test_histories_with_tool_calls(self):
        for style, ours in TEMPLATES.items():
            for content in (None, "", "Let me look."):
                messages = history(content=content)
                if style == "deepseek-v3" and content:
                    with self.assertRaisesRegex(ChatTemplateError, r"leaves messages\[2\].tool_calls\[0\]"):
                        ours.render(messages)
                    continue
                with self.subTest(style=style, content=content):
                    got = ours.render(messages)
                    for words in ("look_up", "a is 3", "It is 3.", content or ""):
                        self.assertIn(words, got)
                    self.assertNotIn("None", got)
                    if style == "deepseek-v3":  # transformers drops the null that this template asks for
                        self.assertIn('look_up\n```json\n{"key": "a", "depth": {"min": 1}}\n```', got)
                        continue
                    theirs = copy.deepcopy(messages)
                    if style in MAPPING_STYLES:
                        function = theirs[2]["tool_calls"][0]["function"]
                        function["arguments"] = json.loads(function["arguments"])
                    self.assertEqual(got, self.expected(style, theirs))

    def test_parts_where_the_template_reads_parts(self):
        messages = [text("system", parts("Be ", "brief.")), text("user", parts("27", "+58=")),
                    text("assistant", parts("8", "", "5")), text("user", parts("a", "", "b"))]  # fmt: skip
        got = TEMPLATES["qwen3.5"].render(messages)
        self.assertEqual(got, self.expected("qwen3.5", messages))
        self.assertIn("27+58=", got)
        tool = history()
        tool[3]["content"] = parts("a is", " 3")
        self.assertIn("<tool_response>\na is 3\n", TEMPLATES["qwen3.5"].render(tool))

    def test_parts_stay_parts_where_the_template_tells_them_apart(self):
        ours = template(
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
            "{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}"
        )
        self.assertEqual(ours.render([text("user", parts("27", "+58="))]), "[27][+58=]")

    def test_continuing_the_last_message(self):
        for style in ("deepseek-v3.1", "qwen3", "qwen3-coder", "qwen3.5"):
            for content in ("It is", "It is ", "  It\nis\n", parts("It ", "is ")):
                whole = content if isinstance(content, str) or style == "qwen3.5" else "It is "
                with self.subTest(style=style, content=content):
                    expected = self.theirs.apply_chat_template(
                        [text("user", "Say it"), text("assistant", whole)], chat_template=STYLES[style], tokenize=False,
                        continue_final_message=True,
                    )  # fmt: skip
                    got = TEMPLATES[style].render(
                        [text("user", "Say it"), text("assistant", content)], continue_final_message=True
                    )
                    self.assertEqual(got, expected)


class TestMessages(CustomTestCase):
    def refused(self, ours, messages, words, **options):
        with self.assertRaisesRegex(ChatTemplateError, words) as raised:
            ours.render(messages, **options)
        # Errors about a field begin with its name or state it.
        found = raised.exception.param or str(raised.exception).partition("[")[0].partition(" ")[0]
        self.assertIn(found, ("messages", "tools", "chat_template_kwargs"), str(raised.exception))

    def test_joined_parts_add_nothing(self):
        for style in ("deepseek-v3", "deepseek-r1", "deepseek-v3.1", "qwen3", "qwen3-coder"):
            ours = TEMPLATES[style]
            for role in ("user", "system"):
                plain = ours.render([text(role, "27+58="), text("user", "x")])
                for split in (parts("27", "+58="), parts("27+58=", ""), parts("", "27+58="), parts("27+58=")):
                    self.assertEqual(ours.render([text(role, split), text("user", "x")]), plain, (style, role))

    def test_unknown_roles_are_refused_everywhere(self):
        for ours in TEMPLATES.values():
            for role in ("System", "", "ipython", "model", None, 3, ["user"]):
                self.refused(ours, [text("user", "a"), text(role, "b")], r"messages\[1\]\.role must be one of")

    def test_developer_is_system_where_the_template_does_not_know_it(self):
        for style, ours in TEMPLATES.items():
            with self.subTest(style):
                got = ours.render([text("developer", "Be brief."), text("user", "a")])
                self.assertIn("Be brief.", got)
                if style != "qwen3-coder":  # it renders every role by its name
                    self.assertEqual(got, ours.render([text("system", "Be brief."), text("user", "a")]))

    def test_a_message_that_is_left_out_is_named(self):
        for style in ("deepseek-v3", "deepseek-r1", "deepseek-v3.1", "qwen3"):
            ours = TEMPLATES[style]
            with self.subTest(style):
                for content in ("x", "", "a", "user", parts("x")):
                    messages = [text("user", "a"), text("function", content, name="f"), text("user", "b")]
                    self.refused(ours, messages, r"leaves messages\[1\]\.content \(role 'function'\)")
                    self.refused(ours, messages, r"messages\[1\]")  # a second time alike
        without_calls = template("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
        self.refused(without_calls, history(), r"leaves messages\[2\]\.tool_calls\[0\]")
        without_arguments = template(CALLS % "c.function.name")
        self.refused(without_arguments, history(), r"tool_calls\[0\]\.function\.arguments")
        last_alone = template("{{ messages[-1].content }}")
        self.assertEqual(last_alone.render([text("user", "a")]), "a")
        self.refused(last_alone, [text("user", "a"), text("user", "a")], r"messages\[0\]\.content")

    def test_a_tool_that_is_left_out_is_named_though_messages_say_its_name(self):
        tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
        for style in ("deepseek-v3", "deepseek-r1", "qwen3-coder"):
            for messages in (history(), [text("user", "Please look_up a.")]):
                with self.subTest(style=style), self.assertRaises(ChatTemplateError) as caught:
                    TEMPLATES[style].render(messages, tools=tools)
                self.assertRegex(str(caught.exception), "does not show it the tool 'look_up'")
                self.assertEqual(caught.exception.param, "tools")
        self.assertEqual(TEMPLATES["qwen3"].render(history(), tools=tools).count("look_up"), 2)
        first_alone = template("{% for m in messages %}{{ m.content }}{% endfor %}{{ tools[0].function.name }}")
        twice = [*tools, {"type": "function", "function": {"name": "look"}}]
        self.refused(first_alone, [text("user", "a")], "the tool 'look'", tools=twice)

    def test_contents_that_make_the_template_choose(self):
        # The marks cannot be rendered: the contents themselves are looked for.
        digits = template("{% for m in messages %}{% if m.content|length > 9 %}{{ raise_exception('long') }}{% endif %}"
                          "{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")  # fmt: skip
        self.assertEqual(digits.render([text("user", "abc")]), "abc")
        self.refused(digits, [text("user", "abc"), text("system", "xyz")], r"messages\[1\]")

    def test_arguments(self):
        for style in STYLES:
            ours = TEMPLATES[style]
            for bad in ("{", "[1]", "3", "nul", '{"a":', "[" * 100_000):
                self.refused(ours, history(bad), r"messages\[2\]\.tool_calls\[0\]\.function\.arguments")
            for empty in ("", None, "{}", {}):
                self.assertEqual(ours.render(history(empty)), ours.render(history("{}")), style)
            as_object = ours.render(history({"key": "a", "depth": {"min": 1}}))
            self.assertEqual(as_object, ours.render(history()), style)
        odd = '{"b" :1,\n "a":"\\u00e9"}'
        self.assertIn(odd, TEMPLATES["deepseek-r1"].render(history(odd)))
        as_json = template(CALLS % "c.function | tojson")
        self.assertIn('"arguments": {"key": "a"', as_json.render(history()))

    def test_malformed_messages_name_the_field(self):
        user = [text("user", "a")]
        for message, words in (
            (text("user", None), r"messages\[1\]\.content is missing"),
            ({"role": "user"}, r"messages\[1\]\.content is missing"),
            (text("user", 5), r"messages\[1\]\.content must be a string"),
            (text("user", [{"type": "image_url"}]), r"messages\[1\]\.content\[0\].*'image_url'"),
            (text("user", ["a"]), r"messages\[1\]\.content\[0\]"),
            (text("user", parts("a") + [{"type": "text", "text": 1}]), r"messages\[1\]\.content\[1\]"),
            (text("assistant", "", audio={"id": "x"}), r"messages\[1\]\.audio"),
            (text("assistant", None, tool_calls="f"), r"messages\[1\]\.tool_calls must be a list"),
            (text("assistant", None, tool_calls=[3]), r"messages\[1\]\.tool_calls\[0\]"),
            (text("assistant", None, tool_calls=[call("{}"), {"function": {}}]), r"messages\[1\]\.tool_calls\[1\]"),
            ("hello", r"messages\[1\] must be an object"),
        ):
            self.refused(TEMPLATES["qwen3.5"], [*user, message], words)
        self.refused(TEMPLATES["qwen3.5"], [], "messages is empty")

    def test_older_and_refused_answers_of_the_client(self):
        older = {"role": "assistant", "content": None, "function_call": {"name": "look_up", "arguments": '{"k": 1}'}}
        self.assertIn("look_up", TEMPLATES["qwen3.5"].render([text("user", "a"), older, text("user", "b")]))
        refusal = {"role": "assistant", "content": None, "refusal": "I will not."}
        for ours in TEMPLATES.values():
            self.assertIn("I will not.", ours.render([text("user", "a"), refusal, text("user", "b")]))
            ours.render([text("user", "a"), text("assistant", None), text("user", "b")])
            ours.render([text("user", "a"), text("assistant", "b", tool_calls=[]), text("user", "b")])

    def test_variables_of_the_client(self):
        ours = template("{{ messages[0].content }}{{ self_ }}{{ mood }}{{ range(2)|list }}{{ tokenize }}")
        self.assertEqual(ours.render([text("user", "a")], variables={"mood": "b", "tokenize": 1}), "ab[0, 1]1")
        names = "self continue_final_message messages tools documents add_generation_prompt loop range raise_exception"
        for name in (*names.split(), "strftime_now", "namespace", "dict", "bos_token", "eos_token"):
            with self.subTest(name):
                self.refused(ours, [text("user", "a")], f"may not set {name}", variables={name: 1})


def doubling(step: str) -> str:
    return "{% set ns = namespace(a='aaaa') %}{% for i in range(99) %}" + step + "{% endfor %}"


class TestLimits(CustomTestCase):
    """Templates that would run for ever, or fill the memory: refused in bounded time, at start or at the request."""

    BOMBS = {
        "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "text in loops": "{% for a in range(99999) %}" + "x" * 9999 + "{% endfor %}",
        "join": "{{ range(99999)|join('x' * 99999) }}",
        "join method": "{{ ('x' * 99999).join(range(99999)|map('string')) }}",
        "product": "{{ 'x' * 10**9 }}",
        "list product": "{{ ([1] * 10**9)|length }}",
        "power": "{{ 7 ** (10**9) }}",
        "squares": "{% set ns = namespace(a=7) %}{% for i in range(99) %}{% set ns.a = ns.a * ns.a %}{% endfor %}",
        "plus": doubling("{% set ns.a = ns.a + ns.a %}"),
        "tilde": doubling("{% set ns.a = ns.a ~ ns.a %}"),
        "tilde of a namespace": doubling("{% set ns.a = ns ~ ns %}"),
        "captured": doubling("{% set ns.a %}{{ ns.a }}{{ ns.a }}{% endset %}"),
        "lists of lists": doubling("{% set ns.a = [ns.a, ns.a] %}") + "{{ ns.a }}",
        "lists of lists to json": doubling("{% set ns.a = {'a': ns.a, 'b': ns.a} %}") + "{{ ns.a|tojson }}",
        "lists of lists compared": "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(64) %}"
        "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{% if ns.a == ns.b %}x{% endif %}",
        "percent": "{{ '%1000000000d' % 3 }}",
        "percent star": "{{ '%*d' % (10**9, 3) }}",
        "format filter": "{{ '%1000000000d'|format(3) }}",
        "format": "{{ '{:1000000000}'.format(3) }}",
        "nested format": "{{ '{:{}}'.format(3, 10**9) }}",
        "justify": "{{ 'x'.ljust(10**9) }}",
        "replace": "{{ ('x' * 99999)|replace('', 'y' * 99999) }}",
        "replace by name": "{{ ('x' * 99999)|replace(old='x', new='y' * 99999) }}",
        "replace method": "{{ ('x' * 99999).replace('', 'y' * 99999) }}",
        "translate": "{{ 'a'.translate({97: 'x'}) }}",
        "indent": "{{ ('\n' * 999999)|indent(100) }}",
        "tojson": "{{ messages|tojson(indent=10**9) }}",
        "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "recursion": "{% for x in [1, 1] recursive %}{% if loop.depth < 40 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}",
        "batch": "{{ range(9)|batch(10**9, 'x')|list }}",
        "round": "{{ 3.7|round(10**9, 'ceil') }}",
        "scans": "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% if 'b' in x %}{% endif %}{% endfor %}",
    }  # fmt: skip

    def test_at_start(self):
        sandbox = "sglang.srt.utils.template_sandbox."
        for name, bomb in self.BOMBS.items():
            with self.subTest(name), mock.patch(sandbox + "MAX_TEMPLATE_CPU_S", 1.0):
                started = time.thread_time()
                with self.assertRaisesRegex(ChatTemplateError, "asks for more than a rendering may use"):
                    template(bomb)
                self.assertLess(time.thread_time() - started, 20)

    def test_at_the_request(self):
        for name in ("loops", "join", "plus"):
            later = template(
                "{% if messages|length > 2 and messages[2].content == 'go' %}" + self.BOMBS[name] + "{% endif %}"
                "{% for m in messages %}{{ m.content }}{% endfor %}"
            )
            messages = [text("user", "a"), text("assistant", "b"), text("user", "go")]
            self.assertEqual(later.render(messages[:2]), "ab")
            with self.assertRaisesRegex(ChatTemplateError, "asks for more"):
                later.render(messages)

    def test_what_cannot_be_compiled(self):
        for name, source in {
            "ifs": "{% if a %}" * 3000 + "{% endif %}" * 3000,
            "fors": "{% for a in b %}" * 50 + "{% endfor %}" * 50,
            "parentheses": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
            "signs": "{{ " + "-" * 20000 + "1 }}",
            "attributes": "{{ a" + ".b" * 60000 + " }}",
            "sums": "{{ 1" + "+1" * 60000 + " }}",
            "size": "x" * (MAX_CHAT_TEMPLATE_CHARS + 1),
            "unknown filter": "{{ 'x'|center(9) }}",
        }.items():
            with self.subTest(name), self.assertRaises(ChatTemplateError):
                template(source)

    def test_long_conversations_are_no_bombs(self):
        messages = [text("user", "hello " * 100), text("assistant", "fine " * 100)] * 400
        for style, ours in TEMPLATES.items():
            self.assertGreater(len(ours.render(messages)), 400_000, style)
        building = template(
            "{% set ns = namespace(all=[]) %}{% for m in messages %}{% set ns.all = ns.all + [m] %}{% endfor %}"
            "{% for m in ns.all %}{{ m.content }}{% endfor %}"
        )
        self.assertGreater(len(building.render(messages)), 400_000)


if __name__ == "__main__":
    unittest.main()
