"""Effect: what a persona does to a model and what it costs, measured for every way of giving a model a persona.

arms.py …    ways of giving a persona: masks, prompts, retrieval, control vectors, LoRA      (an `Arm` each)
tasks …      what is asked of them: contrasts, questionnaires, side effects, free replies    (a `Task` each)
engines …    what runs the model: PyTorch, or the runtime on the quantized file               (an `Engine` each)
run.py       arms x tasks on an engine -> one record, from which the reports are written
"""
