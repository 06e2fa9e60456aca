// Greedy speculative decoding: a draft proposes tokens, and the model reads all of them in one call.
//
// The tokens are those that the model alone would write: a proposal is kept only where it is the
// model's own likeliest token. What a wrong proposal left in a cache is overwritten by the next call,
// which begins at its position.

#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace mobilellm {

using Tokens = std::vector<int64_t>;

// Reads tokens[0, count) at position `start`; the likeliest token after each of the last `rows`.
using Reader =
    std::function<Tokens(const int64_t* tokens, int64_t count, int64_t start, int64_t rows)>;

// At most `most` tokens that may follow the text, none where it has no guess.
using Draft = std::function<Tokens(const Tokens& text, int64_t most)>;

struct Speculation {
  Tokens tokens;
  int64_t drafted = 0, accepted = 0;
  // Of each round, and what of it the draft took. The first round is the prompt, without a draft.
  std::vector<double> ms, draft_ms;
};

// `count` tokens after the prompt, with at most `most` proposals a round. `context` is the model's.
Speculation speculate(const Tokens& prompt, int64_t count, int64_t most, int64_t context,
                      const Reader& model, const Draft& draft);

// A smaller model with the same tokens and a context of its own.
Draft draft_model(Reader model, int64_t context);

// No model: what followed the last tokens where they stood before in the text, the longest match of
// three tokens or two first (prompt lookup: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding).
Draft draft_lookup();

} // namespace mobilellm
