"""Callbacks that attach a `Regularizer` in other people's trainers, a module for each package, which it alone imports.

======================================= ==============================
``fused_reg.integrations.lightning``    Lightning, as ``lightning``
``...pytorch_lightning``                Lightning, by its old name
``...transformers``                     the Trainer of Hugging Face
``...skorch``                           skorch
======================================= ==============================
"""
