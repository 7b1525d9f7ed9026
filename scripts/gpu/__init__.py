"""What a GPU is asked first: ``scripts/gpu/first_run.sh``"""
