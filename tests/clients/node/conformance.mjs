// Every route through the official Node client.
//
// Usage: conformance.mjs URL (a server with the default model under the name `smollm2`)

import assert from "node:assert/strict";
import OpenAI from "openai";

const model = "smollm2";
const messages = [{ role: "user", content: "What is the capital of France?" }];
const weather = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const tool = { type: "function", function: { name: "get_weather", description: "The weather.", parameters: weather } };
const api = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "unused", maxRetries: 0 });

async function refused(kind, status, code, param, call) {
  const error = await call().then(
    () => assert.fail(`${code} was not raised`),
    (error) => error,
  );
  assert(error instanceof kind, `${error}`);
  assert.deepEqual([error.status, error.code, error.param], [status, code, param]);
  assert(error.requestID, "errors carry the request id");
}

const tests = {
  async models() {
    const ids = [];
    for await (const card of api.models.list()) ids.push(card.id);
    assert.deepEqual(ids, [model]);
    assert.equal((await api.models.retrieve(model)).owned_by, "locket");
  },

  async chat() {
    const answer = await api.chat.completions.create({ model, messages, temperature: 0, max_tokens: 30 });
    assert.match(answer.choices[0].message.content, /Paris/);
    assert.equal(answer.choices[0].finish_reason, "stop");
    assert.match(answer._request_id, /^req_/);
    const stream = api.chat.completions.stream({
      model,
      messages,
      temperature: 0,
      max_tokens: 30,
      stream_options: { include_usage: true },
    });
    const whole = await stream.finalChatCompletion();
    assert.equal(whole.choices[0].message.content, answer.choices[0].message.content);
    assert.equal((await stream.totalUsage()).total_tokens, answer.usage.total_tokens);
  },

  async abort() {
    const stream = await api.chat.completions.create({
      model,
      messages,
      stream: true,
      max_tokens: 1000,
      ignore_eos: true,
    });
    for await (const _ of stream) break;
    assert(stream.controller.signal.aborted);
  },

  async completions() {
    const answer = await api.completions.create({ model, prompt: "The sky is", max_tokens: 6, temperature: 0, logprobs: 2 });
    assert.equal(answer.choices[0].logprobs.tokens.length, 6);
    let text = "";
    const stream = await api.completions.create({ model, prompt: "The sky is", max_tokens: 6, temperature: 0, stream: true });
    for await (const chunk of stream) text += chunk.choices[0].text;
    assert.equal(text, answer.choices[0].text);
  },

  async tools() {
    const only = { tool_choice: "required", parallel_tool_calls: false };
    const forced = { model, messages, temperature: 0, tools: [tool], max_tokens: 100, ...only };
    const answer = await api.chat.completions.create(forced);
    const [call] = answer.choices[0].message.tool_calls;
    assert.equal(answer.choices[0].finish_reason, "tool_calls");
    assert.equal(call.function.name, "get_weather");
    assert(weather.properties.city.enum.includes(JSON.parse(call.function.arguments).city));
    const streamed = await api.chat.completions.stream(forced).finalChatCompletion();
    assert.equal(streamed.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
    const next = await api.chat.completions.create({
      model,
      messages: [
        ...messages,
        answer.choices[0].message,
        { role: "tool", tool_call_id: call.id, content: "Sunny, 20 degrees." },
      ],
      tools: [tool],
      max_tokens: 20,
    });
    assert.equal(next.choices[0].message.role, "assistant");
  },

  async structured() {
    const answer = await api.chat.completions.parse({
      model,
      messages,
      temperature: 0,
      max_tokens: 60,
      response_format: { type: "json_schema", json_schema: { name: "city", strict: true, schema: weather } },
    });
    assert(weather.properties.city.enum.includes(answer.choices[0].message.parsed.city));
  },

  async responses() {
    const answer = await api.responses.create({ model, input: "What is the capital of France?", temperature: 0, max_output_tokens: 30 });
    assert.equal(answer.status, "completed");
    assert.match(answer.output_text, /Paris/);
    const events = [];
    const stream = await api.responses.create({
      model,
      input: messages,
      temperature: 0,
      max_output_tokens: 30,
      stream: true,
    });
    for await (const event of stream) events.push(event);
    assert.deepEqual(events.map((event) => event.sequence_number), [...events.keys()]);
    assert.equal(events.at(-1).type, "response.completed");
    const text = events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta);
    assert.equal(text.join(""), answer.output_text);
  },

  async embeddings() {
    const input = ["The cat sat on the mat.", "A cat on a mat.", "Interest rates rose."];
    // The client asks for base64 by itself.
    const packed = await api.embeddings.create({ model, input });
    const plain = await api.embeddings.create({ model, input, encoding_format: "float" });
    const [a, b, c] = packed.data.map((item) => item.embedding);
    const dot = (x, y) => x.reduce((sum, value, index) => sum + value * y[index], 0);
    assert(Math.abs(dot(a, a) - 1) < 1e-3);
    assert(dot(a, b) > dot(a, c));
    plain.data[0].embedding.forEach((value, index) => assert(Math.abs(value - a[index]) < 1e-6));
  },

  async errors() {
    const ask = (changes) => () => api.chat.completions.create({ model, messages, ...changes });
    await refused(OpenAI.BadRequestError, 400, "decimal_above_max_value", "temperature", ask({ temperature: 3 }));
    await refused(OpenAI.NotFoundError, 404, "model_not_found", "model", ask({ model: "nobody" }));
    const schema = { type: "json_schema", json_schema: { name: "x", schema: { type: "nonsense" } } };
    const error = await ask({ response_format: schema })().catch((error) => error);
    assert(error instanceof OpenAI.UnprocessableEntityError, `${error}`);
    assert.equal(error.code, "invalid_json_schema");
  },
};

let failures = 0;
for (const [name, test] of Object.entries(tests)) {
  try {
    await test();
  } catch (error) {
    failures += 1;
    console.error(`${name}:`, error);
  }
}
console.log(`node: ${Object.keys(tests).length - failures} of ${Object.keys(tests).length} passed`);
process.exit(failures ? 1 : 0);
