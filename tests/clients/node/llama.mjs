/** Greedy tokens of a GGUF in the llama.cpp that node-llama-cpp brings. */

import { LlamaLogLevel, getLlama } from "node-llama-cpp";

/** `steps` greedy tokens after each of `prompts`, and the tokens of each of the texts `text`. */
export async function tokens({ path, prompts, steps, text }) {
  const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, progressLogs: false,
    logLevel: LlamaLogLevel.error, maxThreads: 1,
  });
  const model = await llama.loadModel({ modelPath: path, gpuLayers: 0 });
  const contextSize = Math.max(...prompts.map((prompt) => prompt.length)) + steps;
  const context = await model.createContext({ contextSize, threads: 1 });
  const sequence = context.getSequence();
  const found = [];
  const started = performance.now();
  for (const prompt of prompts) {
    await sequence.clearHistory();
    const generated = [];
    for await (const token of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
      generated.push(token);
      if (generated.length === steps) break;
    }
    found.push(generated);
  }
  const milliseconds = performance.now() - started;
  const encoded = text.map((one) => model.tokenize(one, true));
  return {
    tokens: found,
    encoded,
    milliseconds_per_token: milliseconds / prompts.length / steps,
    release: llama.llamaCppRelease.release,
  };
}
