//! The program, instruction by instruction.
//!
//! ```text
//!  if ctx.protocol != TCP                      -> pass
//!  if ctx.family == INET6: if local != ::1     -> pass;  slot = 1
//!  else:                   if local != 127/8   -> pass;  slot = 0
//!  listener = map[slot]    (none               -> pass)
//!  sk_assign(ctx, listener); sk_release(listener)
//!  pass: return SK_PASS    (with no socket assigned the kernel looks for itself)
//! ```
//!
//! Encoding: the kernel's Documentation/bpf/standardization/instruction-set.rst. Offsets of the context, numbers of
//! helpers and of verdicts: `struct bpf_sk_lookup`, `enum bpf_func_id` and `enum sk_action` of <linux/bpf.h>; they are
//! ABI and as here since 5.9.

use std::os::fd::RawFd;

/// `struct bpf_insn`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    code: u8,
    /// Destination in the low four bits, source in the high ones.
    registers: u8,
    offset: i16,
    immediate: i32,
}

// Registers: result, arguments, two that calls leave alone, frame pointer.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const R6: u8 = 6;
const R7: u8 = 7;
const FP: u8 = 10;

// Fields of the context, bytes from its start.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

const SK_PASS: i32 = 1;

/// `BPF_PSEUDO_MAP_FD`: the constant is a map's descriptor.
const PSEUDO_MAP_FD: u8 = 1;
/// Where the map's key is on the stack.
const KEY: i16 = -4;

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: from << 4 | to, offset, immediate }
}

/// `BPF_ALU64 | BPF_MOV | BPF_K`.
const fn set(to: u8, value: i32) -> Instruction {
    instruction(0xb7, to, 0, 0, value)
}

/// `BPF_ALU64 | BPF_MOV | BPF_X`.
const fn copy(to: u8, from: u8) -> Instruction {
    instruction(0xbf, to, from, 0, 0)
}

/// `BPF_ALU64 | BPF_ADD | BPF_K`.
const fn add(to: u8, value: i32) -> Instruction {
    instruction(0x07, to, 0, 0, value)
}

/// `BPF_LDX | BPF_MEM | BPF_W`: four bytes.
const fn load(to: u8, from: u8, offset: i16) -> Instruction {
    instruction(0x61, to, from, offset, 0)
}

/// `BPF_LDX | BPF_MEM | BPF_B`: one byte.
const fn load_byte(to: u8, from: u8, offset: i16) -> Instruction {
    instruction(0x71, to, from, offset, 0)
}

/// `BPF_ST | BPF_MEM | BPF_W`: four bytes.
const fn store(to: u8, offset: i16, value: i32) -> Instruction {
    instruction(0x62, to, 0, offset, value)
}

/// `BPF_JMP | BPF_CALL`.
const fn call(helper: i32) -> Instruction {
    instruction(0x85, 0, 0, 0, helper)
}

/// `BPF_JMP | BPF_EXIT`.
const fn exit() -> Instruction {
    instruction(0x95, 0, 0, 0, 0)
}

/// A place that is jumped to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Label {
    V6,
    Assign,
    Pass,
}

/// Instructions so far, jumps still without their distances.
#[derive(Debug, Default)]
struct Assembly {
    done: Vec<Instruction>,
    jumps: Vec<(usize, Label)>,
    labels: Vec<(Label, usize)>,
}

impl Assembly {
    fn put(&mut self, instructions: &[Instruction]) -> &mut Self {
        self.done.extend_from_slice(instructions);
        self
    }

    /// `BPF_JMP | BPF_JNE | BPF_K`: jumps when they differ.
    fn unless(&mut self, register: u8, value: i32, to: Label) -> &mut Self {
        self.jump(instruction(0x55, register, 0, 0, value), to)
    }

    /// `BPF_JMP | BPF_JEQ | BPF_K`: jumps when they are equal.
    fn when(&mut self, register: u8, value: i32, to: Label) -> &mut Self {
        self.jump(instruction(0x15, register, 0, 0, value), to)
    }

    /// `BPF_JMP | BPF_JA`.
    fn always(&mut self, to: Label) -> &mut Self {
        self.jump(instruction(0x05, 0, 0, 0, 0), to)
    }

    fn jump(&mut self, jump: Instruction, to: Label) -> &mut Self {
        self.jumps.push((self.done.len(), to));
        self.put(&[jump])
    }

    fn label(&mut self, label: Label) -> &mut Self {
        self.labels.push((label, self.done.len()));
        self
    }

    /// Fills the distances in, counted from the instruction after the jump.
    fn finish(&mut self) -> Vec<Instruction> {
        for (at, to) in &self.jumps {
            let (_, target) =
                self.labels.iter().find(|(label, _)| label == to).expect("every label is placed");
            self.done[*at].offset = i16::try_from(target - at - 1).expect("a short program that jumps ahead");
        }
        std::mem::take(&mut self.done)
    }
}

/// The program for the map whose descriptor is `map`.
pub fn assemble(map: RawFd) -> Vec<Instruction> {
    let mut program = Assembly::default();
    program.put(&[copy(R6, R1), load(R2, R6, PROTOCOL)]).unless(R2, libc::IPPROTO_TCP, Label::Pass);
    program.put(&[load(R2, R6, FAMILY)]).when(R2, libc::AF_INET6, Label::V6);

    program.put(&[load_byte(R2, R6, LOCAL_IP4)]).unless(R2, 127, Label::Pass);
    program.put(&[store(FP, KEY, super::V4.cast_signed())]).always(Label::Assign);

    program.label(Label::V6);
    for word in [0, 4, 8] {
        program.put(&[load(R2, R6, LOCAL_IP6 + word)]).unless(R2, 0, Label::Pass);
    }
    // In the network's order, so that a big-endian machine would see 1.
    program.put(&[load(R2, R6, LOCAL_IP6 + 12)]).unless(R2, 1_i32.to_be(), Label::Pass);
    program.put(&[store(FP, KEY, super::V6.cast_signed())]);

    program.label(Label::Assign);
    program.put(&[
        // BPF_LD | BPF_IMM | BPF_DW: a constant of 64 bits, in two instructions.
        instruction(0x18, R1, PSEUDO_MAP_FD, 0, map),
        instruction(0, 0, 0, 0, 0),
        copy(R2, FP),
        add(R2, KEY.into()),
        call(MAP_LOOKUP_ELEM),
    ]);
    program.when(R0, 0, Label::Pass);
    // The lookup counted a reference to the listener, which has to be given back.
    program.put(&[copy(R7, R0), copy(R1, R6), copy(R2, R7), set(R3, 0), call(SK_ASSIGN)]);
    program.put(&[copy(R1, R7), call(SK_RELEASE)]);
    program.label(Label::Pass).put(&[set(R0, SK_PASS), exit()]);
    program.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_is_eight_bytes_as_the_kernel_has_them() {
        assert_eq!(size_of::<Instruction>(), 8);
        // r6 = r1; then a load of four bytes from r6 + 12 to r2: source in the high four bits.
        let program = assemble(5);
        assert_eq!(program[0], Instruction { code: 0xbf, registers: 0x16, offset: 0, immediate: 0 });
        assert_eq!(program[1], Instruction { code: 0x61, registers: 0x62, offset: 12, immediate: 0 });
    }

    /// What the program does with a packet: the slot it looks up, or nothing where it passes.
    fn run(program: &[Instruction], family: i32, protocol: i32, ip4: [u8; 4], ip6: [u8; 16]) -> Option<i32> {
        let mut context = [0; 72];
        context[8..12].copy_from_slice(&family.to_ne_bytes());
        context[12..16].copy_from_slice(&protocol.to_ne_bytes());
        context[40..44].copy_from_slice(&ip4);
        context[44..60].copy_from_slice(&ip6);
        let word = |at: usize| i32::from_ne_bytes(context[at..at + 4].try_into().unwrap());
        let (mut at, mut r2, mut key) = (0, 0, None);
        loop {
            let now = program[at];
            let place = usize::from(now.offset.unsigned_abs());
            at += 1;
            match now.code {
                0xbf | 0x18 | 0x07 | 0 => {}
                0x61 => r2 = word(place),
                0x71 => r2 = context[place].into(),
                0x62 => key = Some(now.immediate),
                0x55 if r2 != now.immediate => at += place,
                0x15 if r2 == now.immediate => at += place,
                0x05 => at += place,
                0x55 | 0x15 => {}
                0x85 => return key, // it looks into the map
                0xb7 => {
                    assert_eq!((now.registers, now.immediate), (R0, SK_PASS));
                    return None;
                }
                code => panic!("{code:#x}"),
            }
        }
    }

    #[test]
    fn tcp_to_a_loopback_address_is_steered_and_nothing_else() {
        let program = assemble(5);
        let (tcp, inet, inet6) = (libc::IPPROTO_TCP, libc::AF_INET, libc::AF_INET6);
        let one = |last: u8, first: u8| {
            let mut ip6 = [0; 16];
            (ip6[0], ip6[15]) = (first, last);
            ip6
        };
        for ip4 in [[127, 0, 0, 1], [127, 255, 0, 9]] {
            assert_eq!(run(&program, inet, tcp, ip4, [0; 16]), Some(0), "{ip4:?}");
        }
        for ip4 in [[10, 0, 0, 127], [128, 0, 0, 1], [126, 255, 255, 255], [0; 4]] {
            assert_eq!(run(&program, inet, tcp, ip4, [0; 16]), None, "{ip4:?}");
        }
        assert_eq!(run(&program, inet6, tcp, [0; 4], one(1, 0)), Some(1));
        for ip6 in [one(2, 0), one(1, 0xfe), [0; 16], one(0, 1)] {
            assert_eq!(run(&program, inet6, tcp, [127, 0, 0, 1], ip6), None, "{ip6:?}");
        }
        assert_eq!(run(&program, inet, libc::IPPROTO_UDP, [127, 0, 0, 1], [0; 16]), None);
    }

    #[test]
    fn every_way_ends_at_the_verdict() {
        let program = assemble(5);
        let verdict = program.len() - 2;
        for (at, jump) in program.iter().enumerate().filter(|(_, now)| [0x55, 0x15].contains(&now.code)) {
            let target = at + 1 + usize::try_from(jump.offset).unwrap();
            assert!(target == verdict || at == 4, "instruction {at} jumps to {target}");
        }
        assert_eq!(program[verdict..], [set(R0, SK_PASS), exit()]);
    }
}
