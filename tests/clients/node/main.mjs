/** `node --import ./offline.mjs main.mjs CLIENT`: a request on stdin, its answer on stdout (JSON). */

import { readFileSync, writeSync } from "node:fs";
import { dirname } from "node:path";

const clients = {
  transformers: async (request) => {
    const library = await import("@huggingface/transformers");
    const { answer } = await import("./transformers.mjs");
    library.env.allowRemoteModels = false;
    library.env.localModelPath = request.models;
    return answer(library, request);
  },
  onnxruntime: async (request) => {
    const { default: runtime } = await import("onnxruntime-node");
    const { tokens } = await import("./onnxruntime.mjs");
    return tokens(runtime, request);
  },
  llama: async (request) => (await import("./llama.mjs")).tokens(request),
};

const answered = await clients[process.argv[2]](JSON.parse(readFileSync(0, "utf8")));
writeSync(1, JSON.stringify(answered));
process.exit(0);
