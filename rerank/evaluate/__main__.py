from rerank.launch import recipe

if __name__ == "__main__":
    recipe.launch("evaluate")
