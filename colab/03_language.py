# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 Language: text, a conversation, and attention over the prompt
#
# A language model of the Llama family (LLaMA, Vicuna, SmolLM2, any checkpoint with `model_type`
# "llama") with its tokenizer: it answers a prompt, keeps its cache over the turns of a
# conversation, and shows which tokens of the prompt it attends to.
#
# On Colab, set `SOURCE` in the next cell to the address of the repository.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("perception_jax") is None:
    # A checkout, such as the one that contains this notebook, or git+https:// and an address.
    SOURCE = ".."  # @param {type:"string"}
    wanted = f"perception_jax[hub] @ {SOURCE}" if "+" in SOURCE else f"{SOURCE}[hub]"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)

import pathlib

import jax
import matplotlib.pyplot as plt
import numpy as np

import perception_jax
from perception_jax.systems.text import Chat, TextModel, prompt_attention

print(f"perception_jax {perception_jax.__version__}, jax {jax.__version__} on {jax.devices()[0]}")

# %% [markdown]
# ## Settings
#
# `MODEL` is a hub id, a folder of Hugging Face, or a GGUF file (extra `[gguf]`).

# %% tags=["parameters"]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # @param {type:"string"}
PROMPT = "What is the capital of France?"  # @param {type:"string"}
TURNS = ["My name is Anna.", "What is my name?"]
LAYER = 18  # whose attention is shown
TOKENS = 40  # at most, for each answer
OUT = "runs/03_language"  # the picture goes here

# %% [markdown]
# ## An answer
#
# The prompt is put into the template that the tokenizer's files describe. Decoding is greedy
# unless the checkpoint's `generation_config.json` or `TextModel(..., sampling=Sampling(...))`
# says otherwise.

# %%
model = TextModel(perception_jax.load(MODEL))
prompt = model.prompt_ids(PROMPT)
print(model.tokenizer.decode(prompt, special=True))
(answer,) = model.answer([prompt], tokens=TOKENS)
print(answer.text)
print(
    f"{len(answer.ids)} tokens, ended by {answer.ended}; sum of log-probabilities "
    f"{sum(answer.log_probs):.2f}"
)

# %% [markdown]
# ## A conversation
#
# Each turn is tokenized with the whole conversation; only tokens that the cache lacks are computed.

# %%
chat = Chat(model, tokens=TOKENS)
for text in TURNS:
    print(f"> {text}")
    for piece in chat.say(text):
        print(piece, end="", flush=True)
    print(f"\n({chat.read} tokens were read)")

# %% [markdown]
# ## Attention over the prompt
#
# For each token of the answer, the attention at the moment at which it was chosen: one layer, mean
# over heads. The first token of the prompt gets most of what is needed nowhere, and is left out.

# %%
found = prompt_attention(model, prompt, answer.ids, layer=LAYER)
rows, columns = found.prompt[1:], found.answer
figure, axes = plt.subplots(
    figsize=(1.5 + 0.35 * len(columns), 1.5 + 0.22 * len(rows)), layout="constrained"
)
axes.imshow(np.sqrt(found.rows[:, 1:].T), cmap="inferno", aspect="auto")
axes.set_xticks(range(len(columns)), columns, rotation=90, parse_math=False)
axes.set_yticks(range(len(rows)), rows, parse_math=False)
pathlib.Path(OUT).mkdir(parents=True, exist_ok=True)
figure.savefig(pathlib.Path(OUT) / "attention.png", dpi=100)
plt.show()
