// Fibers: a thread of the threadgroup runs until it waits for others, then another one goes on.
#include "runtime.h"

const u64 STACK_BYTES = 96 * 1024;
static u8* stacks;
static void* main_stack;
Fiber* current;
Fiber fibers[MOST_THREADS];

#ifdef __APPLE__
#define SYMBOL(NAME) "_" NAME
#else
#define SYMBOL(NAME) NAME
#endif

extern "C" void msl_switch(void** save, void* resume);
#if defined(__x86_64__)
const u32 SAVED_REGISTERS = 6;
asm(".text\n.globl " SYMBOL("msl_switch") "\n" SYMBOL("msl_switch") ":\n"
    "  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp\n"
    "  ret\n");
#elif defined(__aarch64__)
const u32 SAVED_REGISTERS = 20, LINK_REGISTER = 11;
asm(".text\n.globl " SYMBOL("msl_switch") "\n.p2align 2\n" SYMBOL("msl_switch") ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n"
    "  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n"
    "  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  ret\n");
#endif

// The lowest word is zero until a thread has used all of its stack; below the first is a spare.
static u8* stack_of(const Fiber& fiber) { return stacks + (fiber.index + 1) * STACK_BYTES; }

static void begin() {
  job->entry(job->arguments, current->positions);
  current->state = DONE;
  fiber_wait();
  abort();  // a fiber that is done is never resumed
}

void fiber_start(Fiber& fiber) {
  if (!stacks) stacks = (u8*)calloc(MOST_THREADS + 1, STACK_BYTES);
  *(u64*)stack_of(fiber) = 0;
  u64 top = (u64)(stack_of(fiber) + STACK_BYTES - 64) & ~15ull;
  void** words = (void**)top;
#if defined(__x86_64__)
  *--words = nullptr;  // where begin() would return to; aligns the stack as a call does
  *--words = (void*)begin;
  for (u32 i = 0; i < SAVED_REGISTERS; i++) *--words = nullptr;
#else
  words -= SAVED_REGISTERS;
  for (u32 i = 0; i < SAVED_REGISTERS; i++) words[i] = nullptr;
  words[LINK_REGISTER] = (void*)begin;
#endif
  fiber.stack_pointer = words;
}

void fiber_run(Fiber& fiber) {
  current = &fiber;
  msl_switch(&main_stack, fiber.stack_pointer);
  if (*(u64*)stack_of(fiber)) stop("a thread's own memory exceeds %llu bytes", STACK_BYTES);
}

void fiber_wait() { msl_switch(&current->stack_pointer, main_stack); }
