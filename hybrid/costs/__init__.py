"""What a run costs, as pure functions of its settings: parameters, operations, memory, messages and time."""
