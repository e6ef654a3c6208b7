"""``gradsel demo``: ``gradsel finetune`` on data that ships with scikit-learn, and studies of what to train on them."""
