// Vercel's AI SDK: an answer, a stream, an object of a schema, a tool call. `npm install` first.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const url = process.env.INFERFLUX_URL ?? "http://127.0.0.1:8080";
const inferflux = createOpenAICompatible({
  name: "inferflux",
  baseURL: `${url}/v1`,
  apiKey: process.env.INFERCTL_API_KEY,
  supportsStructuredOutputs: true,
});
const model = inferflux(process.env.INFERFLUX_MODEL ?? "smollm2-135m");
const ask = { model, temperature: 0, maxOutputTokens: 64, prompt: "What is the capital of France?" };
const city = z.object({ name: z.string().max(20), isCapital: z.boolean() });

console.log("answer:", (await generateText(ask)).text);

let streamed = "";
for await (const part of streamText(ask).textStream) streamed += part;
console.log("stream:", streamed);

console.log("object:", (await generateText({ ...ask, output: Output.object({ schema: city }) })).output);

const lookUp = tool({ description: "Look up a city", inputSchema: city });
const { toolCalls } = await generateText({ ...ask, tools: { lookUp }, toolChoice: { type: "tool", toolName: "lookUp" } });
console.log("tool call:", toolCalls[0].toolName, toolCalls[0].input);
