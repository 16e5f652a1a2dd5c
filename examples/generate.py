"""Generate text: one prompt as it comes, several together, and the log-probabilities of a text.

python examples/generate.py build/careful --prompt "Call me Ishmael."
"""

from __future__ import annotations

import argparse

import npuq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an artifact, or an unquantized checkpoint")
    parser.add_argument("--prompt", default="Call me Ishmael.")
    parser.add_argument("--tokens", type=int, default=20)
    options = parser.parse_args()

    # On an NPU where there is one, else on the CPU; `backend="cpu"` chooses.
    model = npuq.load(options.model)

    # As it comes. Without options sampling follows the model's generation_config.json.
    for piece in model.stream(options.prompt, max_new_tokens=options.tokens, temperature=0):
        print(piece.text, end="", flush=True)
    print()

    # Several prompts share the steps. With a seed the same prompt gives the same text, whatever runs beside it.
    for completion in model.generate([options.prompt, "The river"], max_new_tokens=options.tokens, seed=7):
        print(f"{completion.completion_tokens} tokens, {completion.finish_reason}: {completion.text!r}")

    # Log-probabilities of the prompt's own tokens: how well the model expects a text.
    params = npuq.SamplingParams(max_new_tokens=1, prompt_logprobs=0)
    (scored,) = model.generate([options.prompt], params)
    known = [entry for entry in scored.prompt_logprobs or () if entry is not None]
    print(f"the prompt's {len(known)} predicted tokens: {sum(entry.logprob for entry in known):.2f} nats in all")
    model.close()


if __name__ == "__main__":
    main()
