"""Which machine to rent for a model, a workload and goals: plans ranked by what they cost."""
