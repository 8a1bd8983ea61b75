"""The kinds of image encoder, one module for each library that towers come from; build them with mm1.model.image_encoder."""
