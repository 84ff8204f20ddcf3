"""The ablation of EXPO's two parts: ordinary runs by arm, pool and seed, compared in pairs."""
