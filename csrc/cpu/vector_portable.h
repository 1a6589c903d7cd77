// 8 floats in an array: plain C++ that compilers turn into whatever the target has.
struct Vec {
  static constexpr int kWidth = 8;
  static constexpr int kQueries = 2;
  static constexpr int kKeys = 2;
  float value[kWidth];

  static Vec zero() { return broadcast(0.0f); }
  static Vec broadcast(float x) {
    Vec result;
    for (int i = 0; i < kWidth; ++i) result.value[i] = x;
    return result;
  }
  template <class T>
  static Vec load(const T* p) {
    Vec result;
    for (int i = 0; i < kWidth; ++i) result.value[i] = widen(p[i]);
    return result;
  }
  void store(float* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = value[i];
  }
  Vec operator+(const Vec& other) const {
    Vec result;
    for (int i = 0; i < kWidth; ++i) result.value[i] = value[i] + other.value[i];
    return result;
  }
  Vec operator-(const Vec& other) const {
    Vec result;
    for (int i = 0; i < kWidth; ++i) result.value[i] = value[i] - other.value[i];
    return result;
  }
  Vec operator*(const Vec& other) const {
    Vec result;
    for (int i = 0; i < kWidth; ++i) result.value[i] = value[i] * other.value[i];
    return result;
  }
  Vec plus_square(const Vec& other) const {
    Vec result;
    for (int i = 0; i < kWidth; ++i) result.value[i] = value[i] + other.value[i] * other.value[i];
    return result;
  }
  float sum() const {
    return ((value[0] + value[4]) + (value[2] + value[6])) + ((value[1] + value[5]) + (value[3] + value[7]));
  }

  template <int K>
  static void sums(const Vec* v, float* out) {
    for (int j = 0; j < K; ++j) out[j] = v[j].sum();
  }
};
