// <metal_type_traits>, array and uniform.
namespace metal {
template <class T, T v> struct integral_constant {
  static constexpr __constant T value = v;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return v; }
};
template <bool b> using bool_constant = integral_constant<bool, b>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool b, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool b, class T = void> using enable_if_t = typename enable_if<b, T>::type;
template <bool b, class T, class U> struct conditional { using type = T; };
template <class T, class U> struct conditional<false, T, U> { using type = U; };
template <bool b, class T, class U> using conditional_t = typename conditional<b, T, U>::type;

template <class T> struct remove_const { using type = T; };
template <class T> struct remove_const<const T> { using type = T; };
template <class T> struct remove_volatile { using type = T; };
template <class T> struct remove_volatile<volatile T> { using type = T; };
template <class T> using remove_const_t = typename remove_const<T>::type;
template <class T> struct remove_cv {
  using type = typename remove_volatile<remove_const_t<T>>::type;
};
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> struct remove_reference { using type = T; };
template <class T> struct remove_reference<T&> { using type = T; };
template <class T> struct remove_reference<T&&> { using type = T; };
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> struct remove_pointer { using type = T; };
template <class T> struct remove_pointer<T*> { using type = T; };
template <class T> using remove_pointer_t = typename remove_pointer<T>::type;
template <class T> struct remove_addrspace { using type = T; };
#define MSL_SPACE(S) \
  template <class T> struct remove_addrspace<S T> { using type = T; }; \
  template <class T> struct remove_addrspace<const S T> { using type = const T; };
MSL_SPACE(__global) MSL_SPACE(__local) MSL_SPACE(__constant) MSL_SPACE(__private)
template <class T> using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T> using decay_t = remove_cv_t<remove_addrspace_t<remove_reference_t<T>>>;

template <class A, class B> constexpr __constant bool is_same_v = __is_same(A, B);
template <class A, class B> struct is_same : bool_constant<is_same_v<A, B>> {};
template <class A, class B> constexpr __constant bool is_convertible_v =
    __is_convertible(A, B) &&
    !((__is_same(A, float) || __is_same(A, half)) && __is_same(B, bfloat));
template <class A, class B> struct is_convertible : bool_constant<is_convertible_v<A, B>> {};
template <class...> struct _disjunction : false_type {};
template <class A, class... B> struct _disjunction<A, B...>
    : conditional<A::value, A, _disjunction<B...>>::type {};

template <class T> constexpr __constant bool __is_integer = false;
template <class T> constexpr __constant bool __is_float = false;
#define MSL_INTEGRAL(T) template <> constexpr __constant bool __is_integer<T> = true;
#define MSL_FLOATING(T) template <> constexpr __constant bool __is_float<T> = true;
MSL_EACH_INTEGER(MSL_INTEGRAL) MSL_INTEGRAL(bool) MSL_INTEGRAL(signed char)
MSL_EACH_FLOAT(MSL_FLOATING) MSL_FLOATING(bfloat)
template <class T> constexpr __constant bool is_integral_v = __is_integer<remove_cv_t<T>>;
template <class T> struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T> constexpr __constant bool is_floating_point_v = __is_float<remove_cv_t<T>>;
template <class T> struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T> constexpr __constant bool is_arithmetic_v =
    is_integral_v<T> || is_floating_point_v<T>;
template <class T> struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T> constexpr __constant bool is_signed_v = T(-1) < T(0);
template <class T> struct is_signed : bool_constant<is_signed_v<T>> {};
template <class T> constexpr __constant bool is_unsigned_v = is_integral_v<T> && !(T(-1) < T(0));
template <class T> struct is_unsigned : bool_constant<is_unsigned_v<T>> {};
template <class T> constexpr __constant bool is_pointer_v = false;
template <class T> constexpr __constant bool is_pointer_v<T*> = true;

template <class T> struct make_unsigned;
#define MSL_UNSIGNED(T) template <> struct make_unsigned<T> { using type = u##T; };
MSL_UNSIGNED(char) MSL_UNSIGNED(short) MSL_UNSIGNED(int) MSL_UNSIGNED(long)
template <class T> using make_unsigned_t = typename make_unsigned<T>::type;

template <class T> MSL_INLINE constexpr T make_uniform(T x) { return x; }
template <class T> using uniform = T;
template <class T, int N> struct array {
  T __d[N];
  MSL_INLINE __private T& operator[](int i) __private { return __d[i]; }
  MSL_INLINE T operator[](int i) const { return __d[i]; }
  constexpr static uint size() { return N; }
};
}  // namespace metal
