"""From files to tokens: documents, the tokenizer, and sequences of one length."""
