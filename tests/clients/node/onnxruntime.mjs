/** Greedy tokens of a graph in ONNX Runtime itself: the same code in Node and in a browser. */

/**
 * `steps` greedy tokens after each prompt.
 *
 * `runtime` is onnxruntime-node or -web, `graph` a path or an address, `data` the address of the
 * external data for a browser, `session` the options of a session. `forced` may have tokens for each
 * prompt that are read in place of the model's own choice; then the logits are in the answer too.
 */
export async function tokens(runtime, { graph, data, prompts, steps, forced, session: options }) {
  const external = data && { externalData: [{ path: data.split("/").at(-1), data }] };
  const session = await runtime.InferenceSession.create(graph, { ...options, ...external });
  const started = performance.now();
  const found = [];
  for (const [place, prompt] of prompts.entries()) {
    found.push(await generate(runtime, session, prompt, steps, forced?.[place]));
  }
  const milliseconds = performance.now() - started;
  await session.release();
  return {
    tokens: found.map((one) => one.tokens),
    logits: forced && found.map((one) => one.logits),
    milliseconds_per_token: milliseconds / prompts.length / steps,
    runtime: runtime.env.versions,
  };
}

async function generate(runtime, session, prompt, steps, forced) {
  const cache = emptyCache(runtime, session);
  const tokens = [], logits = [];
  let read = prompt, length = 0;
  while (tokens.length < steps) {
    length += read.length;
    const inputs = { input_ids: integers(runtime, read), ...cache };
    if (session.inputNames.includes("attention_mask")) {
      inputs.attention_mask = integers(runtime, Array(length).fill(1));
    }
    const outputs = await session.run(inputs);
    for (const name in cache) {
      cache[name] = outputs[name.replace("past_key_values", "present")];
    }
    const scores = outputs.logits.data;
    tokens.push(largest(scores));
    if (forced) logits.push(Array.from(scores));
    read = [forced ? forced[tokens.length - 1] : tokens.at(-1)];
  }
  return { tokens, logits };
}

/** A cache without tokens for each input of the graph that is one. */
function emptyCache(runtime, session) {
  const cache = {};
  for (const { name, shape, type } of session.inputMetadata) {
    if (!name.startsWith("past_key_values.")) continue;
    const [, heads, , head_dim] = shape;
    const empty = type === "float16" ? new Uint16Array(0) : new Float32Array(0);
    cache[name] = new runtime.Tensor(type, empty, [1, heads, 0, head_dim]);
  }
  return cache;
}

const integers = (runtime, values) =>
  new runtime.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

const largest = (scores) => scores.reduce((best, x, at) => (x > scores[best] ? at : best), 0);
