// OpenAI's client for Node against a running server of the model that ships with the package:
//   npm install --prefix /tmp/node openai@6.49.0 && cp scripts/ci/openai_node.mjs /tmp/node
//   node /tmp/node/openai_node.mjs http://127.0.0.1:30000
// Chat and responses, whole and streamed, a form, and an error whose sentence arrives.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "k", maxRetries: 0, timeout: 30000 });
const content = "27+58=";
const chat = { model: "default", messages: [{ role: "user", content }], temperature: 0 };
const turn = { model: "default", input: content, temperature: 0 };

const whole = await client.chat.completions.create(chat);
assert.equal(whole.choices[0].message.content, "85");

let said = "";
for await (const chunk of await client.chat.completions.create({ ...chat, stream: true })) {
  said += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(said, "85");

const schema = { type: "object", properties: { v: { const: 1 } }, required: ["v"], additionalProperties: false };
const form = { type: "json_schema", json_schema: { name: "n", schema } };
const formed = await client.chat.completions.create({ ...chat, response_format: form });
assert.deepEqual(JSON.parse(formed.choices[0].message.content), { v: 1 });

const response = await client.responses.create(turn);
assert.deepEqual([response.output_text, response.status], ["85", "completed"]);
assert.equal((await client.responses.stream(turn).finalResponse()).output_text, "85");

await assert.rejects(client.responses.create({ ...turn, previous_response_id: "resp_1" }), (error) => {
  assert.equal(error.status, 400);
  assert.match(error.message, /previous_response_id is not supported by this server: nothing is stored/);
  return true;
});
console.log("openai-node: all as expected");
