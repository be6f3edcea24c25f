"""``/v1/responses`` to OpenAI's client: items whole and streamed, thoughts, calls, history, forms, refusals."""

import json
import unittest

import httpx
import openai

from sglang.srt.entrypoints.openai.responses_input import chat_body
from sglang.srt.entrypoints.openai.responses_protocol import ResponsesRequest
from sglang.srt.managers.io_struct import FinishReason
from sglang.test.chat_server import ChatServerCase
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

ADD = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 27}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"v": {"const": 1}}, "required": ["v"], "additionalProperties": False}


class ResponsesCase(ChatServerCase):
    def setUp(self):
        self.fake.scheduler.error, self.fake.scheduler.delay_s = None, 0.0

    def create(self, **body):
        return self.client.responses.create(**{"model": "default", "input": "27+58?", "temperature": 0, **body})

    def refusal(self, **body):
        with self.assertRaises(openai.BadRequestError) as caught:
            self.create(**body)
        return caught.exception.param


def plain(item):
    """An item without what is new in each response."""
    told = item.to_dict() if hasattr(item, "to_dict") else dict(item)
    return {key: value for key, value in told.items() if key not in ("id", "call_id")}


class TestItems(ResponsesCase):
    def both(self, **body):
        """The response, which is the same whole and streamed, and the events of the stream."""
        whole = self.create(**body)
        events = list(self.create(stream=True, **body))
        self.assertEqual([event.sequence_number for event in events], list(range(len(events))))
        self.assertEqual([event.type for event in events[:2]], ["response.created", "response.in_progress"])
        last = events[-1].response
        self.assertEqual([plain(item) for item in last.output], [plain(item) for item in whole.output])
        self.assertEqual((last.status, last.usage.to_dict()), (whole.status, whole.usage.to_dict()))
        self.check_events(events, last)
        return whole, events

    def check_events(self, events, response):
        """Deltas add up to the items that are done, and these are in the response."""
        said = {}
        for event in events:
            if event.type.endswith(".delta"):
                said[event.item_id] = said.get(event.item_id, "") + event.delta
            elif event.type in ("response.output_text.done", "response.reasoning_text.done"):
                self.assertEqual(said[event.item_id], event.text)
            elif event.type == "response.function_call_arguments.done":
                self.assertEqual(said[event.item_id], event.arguments)
        added = [event for event in events if event.type == "response.output_item.added"]
        done = [event.item for event in events if event.type == "response.output_item.done"]
        self.assertEqual([event.output_index for event in added], list(range(len(added))))
        self.assertEqual([item.id for item in done], [item.id for item in response.output])
        self.assertEqual([plain(item) for item in done], [plain(item) for item in response.output])

    def test_text(self):
        self.say("85, I said")
        whole, events = self.both(instructions="Add.", metadata={"k": "v"}, user="u", store=True)
        self.assertEqual((whole.output_text, whole.status, whole.object), ("85, I said", "completed", "response"))
        self.assertEqual(
            (whole.instructions, whole.metadata, whole.user, whole.store), ("Add.", {"k": "v"}, "u", False)
        )
        self.assertTrue(whole.id.startswith("resp_"))
        (item,) = whole.output
        self.assertEqual((item.type, item.role, item.status), ("message", "assistant", "completed"))
        self.assertGreater(sum(event.type == "response.output_text.delta" for event in events), 0)
        self.assertIn("Add.", self.prompt())
        usage = whole.usage
        self.assertEqual(usage.total_tokens, usage.input_tokens + usage.output_tokens)

    def test_a_thought_then_text_then_calls(self):
        self.say(f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL}\n{CALL}")
        whole, _ = self.both(tools=[ADD])
        self.assertEqual([item.type for item in whole.output], ["reasoning", "message"] + ["function_call"] * 2)
        thought, message, call, other = whole.output
        self.assertEqual((thought.content[0].text, message.content[0].text), ("Hm.", "Let me see."))
        self.assertEqual((call.name, json.loads(call.arguments), call.status), ("add", {"a": 27}, "completed"))
        self.assertNotEqual(call.call_id, other.call_id)
        self.assertGreater(whole.usage.output_tokens_details.reasoning_tokens, 2)

    def test_cut_off_by_the_limit(self):
        self.say("a long answer that does not end in time")
        whole, events = self.both(max_output_tokens=4)
        self.assertEqual((whole.status, whole.incomplete_details.reason), ("incomplete", "max_output_tokens"))
        self.assertEqual((whole.output[0].status, events[-1].type), ("incomplete", "response.incomplete"))
        self.say("<think>\na long thought")
        whole, _ = self.both(max_output_tokens=6)
        self.assertEqual([(item.type, item.status) for item in whole.output], [("reasoning", "incomplete")])

    def test_the_whole_conversation(self):
        self.say(CALL)
        first = self.create(tools=[ADD])
        history = [
            {"role": "user", "content": [{"type": "input_text", "text": "27+"}, {"type": "input_text", "text": "58?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            *first.output,
            {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "sum is 85"},
        ]
        self.say("It is 85.")
        self.assertEqual(self.create(input=history, tools=[ADD]).output_text, "It is 85.")
        prompt = self.prompt()
        for part in ("27+58?", "Hm.", '"name": "add"', "sum is 85"):
            self.assertIn(part, prompt)
        self.assertLess(prompt.index('"name": "add", "arguments"'), prompt.index("sum is 85"))

    def test_no_thought_is_lost_or_moves_to_another_turn(self):
        def thought(text):
            return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]}

        def turns(*items):
            return [
                (message["role"], message.get("reasoning_content"), len(message.get("tool_calls", ())))
                for message in chat_body(ResponsesRequest(input=list(items))).messages
            ]

        user, said = {"role": "user", "content": "5?"}, {"role": "assistant", "content": "So."}
        call = {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"}
        self.assertEqual(turns(user, thought("A"), said), [("user", None, 0), ("assistant", "A", 0)])
        self.assertEqual(turns(thought("A"), said, thought("B"), call), [("assistant", "A\nB", 1)])
        # A turn that was cut inside of its thought, or continued to think.
        self.assertEqual(turns(user, thought("A"), user, said)[1:], [
            ("assistant", "A", 0), ("user", None, 0), ("assistant", None, 0)
        ])  # fmt: skip
        self.assertEqual(turns(said, thought("A"), user), [("assistant", "A", 0), ("user", None, 0)])
        self.assertEqual(turns(user, thought("A")), [("user", None, 0), ("assistant", "A", 0)])

    def test_forms_and_forced_calls(self):
        self.say('{"v": 1}')
        form = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
        reply = self.create(text={"format": form}, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
        self.assertEqual((reply.output_text, reply.text.format.schema_), ('{"v": 1}', SCHEMA))
        self.assertIsNotNone(self.fake.scheduler.received[-1].grammar)
        self.say(CALL)
        for choice in ("required", {"type": "function", "name": "add"}):
            self.create(tools=[ADD], tool_choice=choice)
            self.assertIn("add", self.fake.scheduler.received[-1].grammar)

    def test_it_is_aborted_by_its_id(self):
        self.say("a" * 1000)
        self.fake.scheduler.delay_s = 0.02
        with self.create(stream=True) as events:
            response = next(events).response
            reply = httpx.post(f"{self.fake.url}/abort_request", json={"rid": response.id})
            self.assertEqual(reply.status_code, 200)
            last = list(events)[-1]
        self.assertEqual((last.type, last.response.status), ("response.incomplete", "cancelled"))
        self.assertLess(last.response.usage.output_tokens, 1000)

    def test_an_error_on_the_way(self):
        self.say("some text that goes on")
        self.fake.scheduler.delay_s = 0.02
        with self.create(stream=True) as stream:
            events = [next(stream) for _ in range(5)]
            self.fake.scheduler.error = FinishReason(type="abort", message="broken", status_code=500, err_type="E")
            events += stream
        self.assertEqual(events[-1].type, "response.failed")
        self.assertEqual(events[-1].response.error.message, "broken")
        with self.assertRaises(openai.InternalServerError):
            self.create()


class TestRefusals(ResponsesCase):
    def test_what_needs_a_state_or_more_than_text(self):
        self.say("85")
        self.assertEqual(self.refusal(previous_response_id="resp_1"), "previous_response_id")
        self.assertEqual(self.refusal(extra_body={"conversation": "c"}), "conversation")
        self.assertEqual(self.refusal(background=True), "background")
        self.assertEqual(self.refusal(truncation="auto"), "truncation")
        self.assertEqual(self.refusal(include=["message.output_text.logprobs"]), "include")
        self.assertEqual(self.refusal(tools=[{"type": "web_search"}]), "tools")
        self.assertEqual(self.refusal(tools=[{"type": "function"}]), "tools")
        self.assertEqual(self.refusal(tools=[ADD], tool_choice={"type": "function", "name": "other"}), "tool_choice")
        for item in (
            {"type": "item_reference", "id": "msg_1"},
            {"type": "web_search_call", "id": "w"},
            {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]},
            {"role": "user", "content": 5},
            {"type": "function_call", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "output": "x"},
        ):
            self.assertEqual(self.refusal(input=[item]), "input", item)
        for form in ({"type": "json_schema", "name": "n"}, {"type": "xml"}):
            self.assertEqual(self.refusal(text={"format": form}), "text.format")
        self.assertEqual(self.refusal(input=[]), "input")
        with self.assertRaises(openai.NotFoundError):
            self.create(model="other")
        with self.assertRaises(openai.NotFoundError):
            self.client.responses.retrieve("resp_1")

    def test_unknown_fields_are_named(self):
        self.say("85")
        body = {"input": "a", "max_tokens": 5, "return_warnings": True, "temperature": 0}
        reply = httpx.post(f"{self.fake.url}/v1/responses", json=body, timeout=60).json()
        self.assertEqual(reply["status"], "completed")
        self.assertIn("max_tokens", str(reply["warnings"]))


if __name__ == "__main__":
    unittest.main()
