/** What transformers.js makes of questions: the same code in Node and in a browser. */

/**
 * Answer each question of the request, then go on with the conversation of the first one.
 *
 * `library` is transformers.js with its environment set, `load` opens a model. The request has
 * `model` (a folder below env.localModelPath), `questions`, `steps`, `follow_up`, and `options` for
 * `from_pretrained`. An answer has the prompt's text and tokens, and `steps` greedy tokens, whether
 * or not one of them ends the text.
 */
export async function answer(library, { model, questions, steps, follow_up, options }) {
  const tokenizer = await library.AutoTokenizer.from_pretrained(model);
  const loaded = await library.AutoModelForCausalLM.from_pretrained(model, options);
  const answers = [];
  let milliseconds = 0;
  for (const question of questions) {
    const { text, encoded } = prompt(tokenizer, [{ role: "user", content: question }]);
    const started = performance.now();
    const found = await loaded.generate({
      ...encoded, max_new_tokens: steps, do_sample: false, eos_token_id: -1,
    });
    milliseconds += performance.now() - started;
    const read = numbers(encoded.input_ids);
    answers.push({ text, prompt: read, tokens: numbers(found).slice(read.length) });
  }
  const generator = await library.pipeline("text-generation", model, options);
  const message = [{ role: "user", content: questions[0] }];
  const written = await generator(message, { max_new_tokens: steps, do_sample: false });
  const reply = written[0].generated_text.at(-1).content;
  return {
    answers,
    reply,
    second_turn: await goOn(tokenizer, loaded, questions[0], follow_up, steps),
    milliseconds_per_token: milliseconds / questions.length / steps,
    runtime: library.env.backends.onnx.versions,
  };
}

/** Answer, then answer a second question with the cache of the first one. */
async function goOn(tokenizer, loaded, question, followUp, steps) {
  const messages = [{ role: "user", content: question }];
  const first = prompt(tokenizer, messages).encoded;
  const { sequences, past_key_values } = await loaded.generate({
    ...first, max_new_tokens: steps, do_sample: false, return_dict_in_generate: true,
  });
  const said = sequences.slice(null, [first.input_ids.dims[1], null]);
  const content = tokenizer.batch_decode(said, { skip_special_tokens: true })[0];
  messages.push({ role: "assistant", content }, { role: "user", content: followUp });
  const { text, encoded } = prompt(tokenizer, messages);
  const cached = past_key_values.get_seq_length();
  const found = await loaded.generate({
    ...encoded, past_key_values, max_new_tokens: steps, do_sample: false, eos_token_id: -1,
  });
  const read = numbers(encoded.input_ids);
  return {
    messages, text, prompt: read, tokens: numbers(found).slice(read.length), cached,
    // The cache can only be used for tokens that it was made of.
    fits: numbers(sequences).slice(0, cached).every((token, place) => token === read[place]),
  };
}

function prompt(tokenizer, messages) {
  const options = { add_generation_prompt: true };
  return {
    text: tokenizer.apply_chat_template(messages, { ...options, tokenize: false }),
    encoded: tokenizer.apply_chat_template(messages, { ...options, return_dict: true }),
  };
}

const numbers = (tensor) => tensor.tolist()[0].map(Number);
