"""The paper's experiments: their data, prompts, encoding, beam search, answers and scores."""
