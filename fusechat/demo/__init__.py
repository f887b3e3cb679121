"""The demo's world: grammars to talk about, tokenizers, and models that know one topic better than another."""
