"""The paper's experiments: data, prompts, decoding and scoring."""
