"""The facts of two models of known sizes, in the form of spec.facts of a BaseModel."""

LLAMA_2_7B = {
    "parameters": 6_738_415_616, "layers": 32, "hiddenSize": 4096, "intermediateSize": 11008, "gatedMlp": True, "heads": 32,
    "kvHeads": 32, "headDim": 128, "vocabSize": 32000, "contextLength": 4096, "dtype": "bfloat16",
    "architecture": "LlamaForCausalLM", "tiedEmbeddings": False,
}  # fmt: skip
LLAMA_2_70B = LLAMA_2_7B | {
    "parameters": 68_976_648_192, "layers": 80, "hiddenSize": 8192, "intermediateSize": 28672, "heads": 64, "kvHeads": 8,
}  # fmt: skip
