"""Which features are worth a look: rankings, image embeddings, and how much alike a feature's best pictures are."""
