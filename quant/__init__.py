"""The mathematics of quantization alone: scale searches, GPTQ, refinement, smoothing, rotation."""
