"""What quantized data is and how it is made: safetensors and checkpoint reading, schemes, packing, scale search, rope
tables and the artifact format. Pure tensor maths and file formats: nothing here knows of command lines, pipelines or
models that run."""
