//! QEMU's side: its functions as we declare them, ours as it calls them.
//!
//! QEMU calls [`qemu_plugin_install`] once, before the guest starts; [`translated`] when it has translated a block;
//! [`executed`] and [`marked`] from translated code. Their arguments are its own: handles that are only handed back to
//! it, and the pointers that were registered.

#![allow(unsafe_code, reason = "the interface is one of C")]

use crate::{
    marker::MARKER,
    tally::{Block, Tally},
};
use std::{
    ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void},
    fs::File,
    io::{self, BufWriter, Write as _},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    ptr, slice,
    sync::{Mutex, OnceLock, PoisonError},
};

/// What this file's declarations are of: the third made `qemu_plugin_insn_data` copy.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals, reason = "QEMU looks for this name")]
pub(crate) static qemu_plugin_version: c_int = 3;

type Id = u64;
/// QEMU's: a block that is being translated.
type Translation = c_void;
/// QEMU's: one of its instructions.
type Instruction = c_void;
type OnTranslation = extern "C" fn(Id, *mut Translation);
type OnExecution = unsafe extern "C" fn(c_uint, *mut c_void);

/// What is called looks at no register of the guest.
const NO_REGISTERS: c_int = 0;

unsafe extern "C" {
    fn qemu_plugin_register_vcpu_tb_trans_cb(id: Id, call: OnTranslation);
    fn qemu_plugin_register_vcpu_tb_exec_cb(
        block: *mut Translation,
        call: OnExecution,
        registers: c_int,
        argument: *mut c_void,
    );
    fn qemu_plugin_register_vcpu_insn_exec_cb(
        instruction: *mut Instruction,
        call: OnExecution,
        registers: c_int,
        argument: *mut c_void,
    );
    fn qemu_plugin_tb_n_insns(block: *const Translation) -> usize;
    fn qemu_plugin_tb_vaddr(block: *const Translation) -> u64;
    fn qemu_plugin_tb_get_insn(block: *const Translation, index: usize) -> *mut Instruction;
    fn qemu_plugin_insn_size(instruction: *const Instruction) -> usize;
    fn qemu_plugin_insn_data(instruction: *const Instruction, to: *mut c_void, len: usize) -> usize;
}

/// Where the files go, as `out=` says.
static OUT: OnceLock<PathBuf> = OnceLock::new();
static TALLY: OnceLock<Mutex<Tally>> = OnceLock::new();

fn with_tally<T>(work: impl FnOnce(&mut Tally) -> T) -> T {
    // A panic ends QEMU, so nothing is ever half done.
    work(&mut TALLY.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner))
}

/// The plugin's beginning. Anything but 0 has QEMU end.
///
/// # Safety
/// As QEMU calls it: `arguments` points to `count` strings.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn qemu_plugin_install(
    id: Id,
    _about: *const c_void,
    count: c_int,
    arguments: *const *const c_char,
) -> c_int {
    let arguments = match usize::try_from(count) {
        // SAFETY: QEMU's are so many, and stay until this returns.
        Ok(count @ 1..) => unsafe { slice::from_raw_parts(arguments, count) },
        _ => &[],
    };
    for &argument in arguments {
        // SAFETY: each is a string that ends with a zero.
        let argument = unsafe { CStr::from_ptr(argument) }.to_bytes();
        match argument.strip_prefix(b"out=") {
            Some(path) if OUT.set(PathBuf::from(OsStr::from_bytes(path))).is_ok() => {}
            _ => {
                say(&format!("unknown argument {}", String::from_utf8_lossy(argument)));
                return 1;
            }
        }
    }
    if OUT.get().is_none() {
        say("out=PATH is missing");
        return 1;
    }
    // SAFETY: `id` is ours, and `translated` is what is called for.
    unsafe { qemu_plugin_register_vcpu_tb_trans_cb(id, translated) };
    0
}

extern "C" fn translated(_: Id, translation: *mut Translation) {
    // SAFETY: QEMU's handle, valid for this call.
    let (address, len) = unsafe { (qemu_plugin_tb_vaddr(translation), qemu_plugin_tb_n_insns(translation)) };
    let block = ptr::from_ref(with_tally(|tally| tally.block(address, len as u64)));
    // SAFETY: `executed` takes a `Block` that stays for ever.
    unsafe {
        qemu_plugin_register_vcpu_tb_exec_cb(translation, executed, NO_REGISTERS, block.cast_mut().cast());
    }
    for index in 0..len {
        // SAFETY: as above, and there are `len` instructions.
        let instruction = unsafe { qemu_plugin_tb_get_insn(translation, index) };
        if is_marker(instruction) {
            // SAFETY: `marked` takes no argument.
            unsafe {
                qemu_plugin_register_vcpu_insn_exec_cb(instruction, marked, NO_REGISTERS, ptr::null_mut());
            }
        }
    }
}

fn is_marker(instruction: *const Instruction) -> bool {
    let mut bytes = [0; MARKER.len()];
    // SAFETY: QEMU's handle, of which no more bytes are copied than there are and than `bytes` has.
    unsafe {
        qemu_plugin_insn_size(instruction) == bytes.len()
            && qemu_plugin_insn_data(instruction, bytes.as_mut_ptr().cast(), bytes.len()) == bytes.len()
            && bytes == MARKER
    }
}

/// # Safety
/// `block` is a [`Block`] that stays for ever.
unsafe extern "C" fn executed(_: c_uint, block: *mut c_void) {
    // SAFETY: `translated` has registered it so; nobody has it but as a shared reference.
    unsafe { &*block.cast_const().cast::<Block>() }.executed();
}

/// # Safety
/// None is asked for; the type is QEMU's.
unsafe extern "C" fn marked(_: c_uint, _: *mut c_void) {
    let written = with_tally(|tally| {
        let mut path = OUT.get().cloned().unwrap_or_default().into_os_string();
        path.push(format!(".{}", tally.next_number()));
        tally.take(BufWriter::new(File::create(path)?))
    });
    if let Err(error) = written {
        // Whoever reads the files finds that one is missing.
        say(&format!("cannot write what was executed: {error}"));
    }
}

fn say(what: &str) {
    // There is nobody else to tell.
    let _ = writeln!(io::stderr(), "qemu-counter: {what}");
}
