"""Training data: tokenizers, corpora, Megatron's `.bin/.idx` files, and the datasets and batches made from them.

`tokenizer`, `corpus`, `indexed` and `prepare` need neither torch nor megatron-core; `datasets` does.
"""
