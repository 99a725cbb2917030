"""Hybrid Mamba-Transformer models: what they are and cost, without torch, and the packages that run them."""
