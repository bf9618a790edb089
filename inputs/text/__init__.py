"""BERT pre-training data: text files → documents → word pieces → corpus → examples."""
