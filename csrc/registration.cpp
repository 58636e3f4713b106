// Every native schema, one line each: the table of contents. Rooms register themselves at the foot
// of csrc/cpu/<family>.cpp (CPU key) and csrc/cuda/<family>.cu (CUDA key).
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastreid_vi_native, m) {
  m.def("gem_pool(Tensor features, float p, float eps) -> (Tensor, Tensor)");
  m.def("gem_pool_backward(Tensor grad, Tensor features, Tensor moment, float p) -> Tensor");
  m.def(
      "pattern_pool(Tensor features, Tensor weight, Tensor? bias, str activation) "
      "-> (Tensor, Tensor)");
  m.def(
      "pattern_pool_backward(Tensor grad_pooled, Tensor grad_maps, Tensor features, Tensor weight, "
      "Tensor maps, str activation) -> (Tensor, Tensor, Tensor)");
  m.def("map_separation_loss(Tensor maps) -> Tensor");
  m.def("map_separation_loss_backward(Tensor grad, Tensor maps) -> Tensor");
  m.def(
      "modality_alleviation(Tensor features, Tensor reduce_weight, Tensor expand_weight, "
      "float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "modality_alleviation_backward(Tensor grad, Tensor features, Tensor reduce_weight, "
      "Tensor expand_weight, Tensor mean, Tensor rstd, Tensor gate) -> (Tensor, Tensor, Tensor)");
  m.def(
      "instance_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor? running_mean, Tensor? running_var, str activation, float negative_slope, "
      "float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "instance_norm_act_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, "
      "Tensor mean, Tensor variance, str activation, float negative_slope, float eps, bool fixed) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "resize_normalize(Tensor images, int height, int width, float[] mean, float[] std) "
      "-> Tensor");
  m.def(
      "resize_normalize_backward(Tensor grad, int height, int width, float[] std, "
      "bool channels_last) -> Tensor");
  m.def("feature_mask(Tensor features) -> Tensor");
  m.def(
      "correspondence_probability(Tensor source, Tensor target, Tensor index, float temperature) "
      "-> (Tensor, Tensor)");
  m.def(
      "correspondence_probability_backward(Tensor grad, Tensor source, Tensor target, "
      "Tensor index, Tensor probability, Tensor lse, float temperature) -> (Tensor, Tensor)");
  m.def(
      "correspondence_warp(Tensor source, Tensor target, Tensor index, Tensor? source_mask, "
      "Tensor? target_mask, float temperature) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "correspondence_warp_backward(Tensor grad, Tensor source, Tensor target, Tensor index, "
      "Tensor probability, Tensor lse, float temperature) -> (Tensor, Tensor)");
  m.def(
      "align_features(Tensor features, Tensor index, Tensor mask, float temperature) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "align_features_backward(Tensor grad, Tensor features, Tensor index, Tensor mask, "
      "Tensor probability, Tensor lse, float temperature) -> Tensor");
  m.def(
      "dense_triplet_loss(Tensor anchor, Tensor positive, Tensor negative, Tensor weight, "
      "float margin, str weighting) -> (Tensor, Tensor)");
  m.def(
      "dense_triplet_loss_backward(Tensor grad, Tensor anchor, Tensor positive, Tensor negative, "
      "Tensor slopes) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dense_alignment(Tensor features, Tensor positive, Tensor negative, float temperature, "
      "float margin, str weighting, float eps) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "dense_alignment_backward(Tensor grad_aligned, Tensor grad_loss, Tensor features, "
      "Tensor positive, Tensor negative, Tensor aligned, Tensor probability, Tensor lse, "
      "Tensor gram, Tensor mask, Tensor slopes, float temperature, float eps) -> Tensor");
  m.def(
      "distribution_adapter(Tensor features, Tensor sc_weight, Tensor sc_bias, Tensor ca_weight, "
      "Tensor ca_bn_weight, Tensor ca_bn_bias, Tensor norm_weight, Tensor norm_bias, "
      "Tensor? ca_running_mean, Tensor? ca_running_var, Tensor? norm_running_mean, "
      "Tensor? norm_running_var, float eps) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "distribution_adapter_backward(Tensor grad, Tensor features, Tensor sc_weight, "
      "Tensor ca_weight, Tensor ca_bn_weight, Tensor norm_weight, Tensor attention, "
      "Tensor context, Tensor mean, Tensor variance, Tensor gate, Tensor ca_mean, Tensor ca_var, "
      "Tensor norm_mean, Tensor norm_var, float eps, bool fixed) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("pairwise_distance(Tensor x, Tensor? y, str metric) -> Tensor");
  m.def(
      "pairwise_distance_backward(Tensor grad, Tensor x, Tensor? y, Tensor distance, str metric) "
      "-> (Tensor, Tensor)");
  m.def(
      "batch_hard_triplet_loss(Tensor embeddings, Tensor labels, Tensor? references, "
      "Tensor? reference_labels, float margin, str metric) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "batch_hard_triplet_loss_backward(Tensor grad, Tensor embeddings, Tensor? references, "
      "Tensor positive, Tensor negative, Tensor weight, str metric) -> (Tensor, Tensor)");
  m.def(
      "weighted_triplet_loss(Tensor embeddings, Tensor labels, bool stable) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "weighted_triplet_loss_backward(Tensor grad, Tensor embeddings, Tensor labels, "
      "Tensor positive, Tensor negative, Tensor slope, Tensor stats, bool stable) -> Tensor");
  m.def(
      "center_cluster_loss(Tensor embeddings, Tensor labels, float margin) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "center_cluster_loss_backward(Tensor grad_pull, Tensor grad_push, Tensor embeddings, "
      "Tensor first, Tensor radius, float margin) -> Tensor");
  m.def("soft_rank(Tensor values, float strength, bool descending) -> (Tensor, Tensor)");
  m.def(
      "soft_rank_backward(Tensor grad, Tensor blocks, float strength, bool descending) -> Tensor");
  m.def(
      "cross_modality_retrieval_loss(Tensor embeddings, Tensor labels, Tensor modalities, "
      "float strength) -> Tensor");
  m.def(
      "cross_modality_retrieval_loss_backward(Tensor grad, Tensor embeddings, Tensor labels, "
      "Tensor modalities, float strength) -> Tensor");
  m.def(
      "augment(Tensor images, Tensor source, Tensor flip, Tensor top, Tensor left, Tensor border, "
      "Tensor kind, Tensor hue, Tensor weights, Tensor boxes, Tensor planes, Tensor channel, "
      "Tensor factor, Tensor nearest, Tensor erase, Tensor values, Tensor levels, "
      "Tensor? channel_mix, ScalarType dtype, bool channels_last) -> Tensor");
  m.def(
      "augment_into(Tensor(a!) out, Tensor images, Tensor source, Tensor flip, Tensor top, "
      "Tensor left, Tensor border, Tensor kind, Tensor hue, Tensor weights, Tensor boxes, "
      "Tensor planes, Tensor channel, Tensor factor, Tensor nearest, Tensor erase, Tensor values, "
      "Tensor levels, Tensor? channel_mix, bool channels_last) -> ()");
  m.def("random_erase(Tensor images, Tensor boxes, Tensor values) -> Tensor");
  m.def(
      "rank_rows(Tensor distance, Tensor query_ids, Tensor query_places, Tensor pool_ids, "
      "Tensor pool_places, Tensor columns, Tensor offsets, int num_ids, int most, str rule) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "merge_top_k(Tensor best, Tensor best_index, Tensor scores, Tensor? indices, Tensor? scale, "
      "Tensor? shift, int first_index, int k) -> (Tensor, Tensor)");
  m.def(
      "pair_scores(Tensor query, Tensor gallery, Tensor query_norms, Tensor gallery_norms, "
      "Tensor columns, str metric) -> Tensor");
  m.def("row_norms(Tensor rows) -> Tensor");
  m.def(
      "rerank_neighbors(Tensor lists, Tensor distances, Tensor features, Tensor maxima, "
      "Tensor rounding, int k1, int half, bool expand) -> (Tensor, Tensor, Tensor)");
  m.def(
      "rerank_average(Tensor lists, Tensor counts, Tensor columns, Tensor values, int room) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "rerank_fuse(Tensor query_counts, Tensor query_columns, Tensor query_values, "
      "Tensor gallery_counts, Tensor gallery_columns, Tensor gallery_values, Tensor base, "
      "Tensor maxima, Tensor rounding, int query_sets, int gallery_sets, int columns, "
      "float weight) -> Tensor");
}

// Importing the module runs the static registrars; it has no Python content of its own.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
