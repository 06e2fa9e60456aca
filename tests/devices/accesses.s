.macro one text:vararg
  adr x1, space
  \text
.endm
.globl _start
_start:
  adr x1, space
  one ldr x2, [x1]
  one ldr w2, [x1, #4]
  one ldrh w2, [x1, #2]
  one ldrb w2, [x1, #1]
  one ldrsb x2, [x1]
  one ldrsh w2, [x1]
  one ldrsw x2, [x1], #4
  one str x2, [x1, #8]!
  one str w2, [x1]
  one strh w2, [x1]
  one strb w2, [x1]
  one ldur x2, [x1, #3]
  one stur w2, [x1, #-1]
  one ldtr x2, [x1]
  mov x3, #8
  one ldr x2, [x1, x3]
  one str w2, [x1, w3, uxtw #2]
  one prfm pldl1keep, [x1]
  one prfm pldl1keep, [x1, x3]
  one prfum pldl1keep, [x1, #3]
  prfm pldl1keep, space
  ldr x2, space
  ldr w2, space
  ldrsw x2, space
  ldr s2, space
  ldr d2, space
  ldr q2, space
  one ldp x2, x3, [x1]
  one ldp w2, w3, [x1], #8
  one ldpsw x2, x3, [x1]
  one stp x2, x3, [x1, #16]!
  one stp w2, w3, [x1]
  one ldnp x2, x3, [x1]
  one stnp q2, q3, [x1]
  one ldp s2, s3, [x1]
  one ldp d2, d3, [x1]
  one stp q2, q3, [x1, #32]!
  one ldr b2, [x1]
  one ldr h2, [x1]
  one ldr s2, [x1], #4
  one ldr d2, [x1]
  one ldr q2, [x1]
  one str b2, [x1]
  one str h2, [x1]
  one str s2, [x1]
  one str d2, [x1]
  one str q2, [x1, #16]
  one ldur q2, [x1, #1]
  mov x3, #16
  one ldr q2, [x1, x3]
  one ld1 {v2.16b}, [x1]
  one ld1 {v2.8b}, [x1], #8
  one ld1 {v2.4s, v3.4s}, [x1]
  one ld1 {v2.4s, v3.4s, v4.4s}, [x1]
  one ld1 {v2.16b-v5.16b}, [x1], #64
  one st1 {v2.16b-v5.16b}, [x1]
  one st1 {v2.2d}, [x1], x3
  one ld2 {v2.8h, v3.8h}, [x1]
  one st2 {v2.8b, v3.8b}, [x1]
  one ld3 {v2.4s, v3.4s, v4.4s}, [x1]
  one ld4 {v2.16b-v5.16b}, [x1]
  one st4 {v2.2s-v5.2s}, [x1]
  one ld1 {v2.b}[3], [x1]
  one ld1 {v2.h}[3], [x1]
  one ld1 {v2.s}[1], [x1], #4
  one ld1 {v2.d}[1], [x1]
  one st1 {v2.d}[1], [x1]
  one st1 {v2.s}[2], [x1]
  one ld2 {v2.s, v3.s}[2], [x1]
  one ld3 {v2.h, v3.h, v4.h}[2], [x1]
  one st4 {v2.d-v5.d}[1], [x1]
  one ld1r {v2.4s}, [x1]
  one ld1r {v2.16b}, [x1]
  one ld2r {v2.2d, v3.2d}, [x1]
  one ld3r {v2.8h-v4.8h}, [x1]
  one ld4r {v2.4s-v5.4s}, [x1], #16
  one ldar x2, [x1]
  one ldarb w2, [x1]
  one stlr w2, [x1]
  one ldxr x2, [x1]
  one ldaxrh w2, [x1]
  one ldxp x2, x3, [x1]
  one ldxp w2, w3, [x1]
  one ldapr w2, [x1]
  one ldapur x2, [x1, #8]
  one stlur w2, [x1, #4]
  one ldapursw x2, [x1, #4]
  one ldadd x2, x3, [x1]
  one ldaddalb w2, w3, [x1]
  one swp w2, w3, [x1]
  one stset x2, [x1]
  one cas x2, x3, [x1]
  one casb w2, w3, [x1]
  mov x4, #0
  one casp x2, x3, x4, x5, [x1]
  one casp w2, w3, w4, w5, [x1]
  one stxr w4, x2, [x1]
  one stlxp w4, x2, x3, [x1]
  one dc zva, x1
  one dc cvau, x1
  add x2, x2, x3
  fmla v2.4s, v3.4s, v4.4s
  mov x0, #0
  mov x8, #93
  svc #0
  .balign 64
  .space 64
space: .space 512
