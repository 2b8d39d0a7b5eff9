"""Models of next items: items as tokens, search of the catalogue, full-catalogue Recall@K and NDCG@K."""
