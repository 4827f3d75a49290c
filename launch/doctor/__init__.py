"""The preflight: is each machine fit for a run, and do they fit together?"""
